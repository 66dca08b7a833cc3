"""Small English children's stories from a grammar: training text that needs no network and no licence.

`story(index)` is a pure function: a cast (who, where, with what), then every choice of the grammar, drawn from one generator
that is seeded with `index`. The text is data in two parts. TABLES has a table's name and columns, then its rows, `|` between
them; a story draws one row of each. RULES has a rule's name, then its alternatives (indented more: the line above goes on):

    (a|b|)             one of these, perhaps nothing        <name>   one alternative of that rule
    {A.he} {gift.a}    fields of the cast, see _cast        /        a new paragraph (in plots only)

A is the hero, B the friend, P the hero's parent (`P.call` as a name), H a creature or person passing by, O the toy; a rule
that begins with "plot" is a whole story. Two rules of the house keep the prose sound, and the tests hold it to them: a pronoun
belongs to the one of A and B whom the narrator named last, and nobody else is ever called "he" or "she".
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable

TABLES = """
girl: name
  Lily | Mia | Anna | Sue | Emma | Lucy | Sara | Amy | Zoe | Ella | Nora | Ruby | Ivy | Kate | Jane | Molly | Grace | Clara | Eva | Maya | Nina | Tina
  Rosa | Lena | Alice | Sophie | Leah | Julia | Hannah | Stella | Carla | Fiona | Greta | Iris | June | Kira | Lola | Megan | Priya | Yuki | Amina
  Zara
boy: name
  Ben | Tom | Tim | Sam | Max | Jack | Leo | Noah | Dan | Jake | Paul | Adam | Eli | Owen | Luke | Henry | Oscar | Ravi | Mark | Peter | Billy | Joe
  Theo | Ned | Ian | Kai | Omar | Hugo | Fred | Alex | Carl | David | Emil | Frank | George | Harry | Jonas | Karl | Liam | Mateo | Nico | Simon
she: name
  Coco | Hazel | Pepper | Ginger | Maple | Nibbles | Rosie | Clover | Tilly | Dotty | Misty | Poppy | Luna | Honey | Olive | Pearl | Fern | Bella
  Minnie | Bonnie
he: name
  Pip | Rusty | Biscuit | Bramble | Bruno | Otis | Felix | Milo | Ziggy | Bingo | Toby | Patch | Scout | Chester | Duke | Finn | Gus | Barney | Rufus
  Waffles
trait: name
  curious | cheerful | playful | clever | lively | funny | quiet | busy | happy | merry | bouncy | dreamy | thoughtful
color: name
  red | blue | green | yellow | purple | orange | pink | white | brown | silver | golden | shiny | striped | spotted | bright red | dark blue
  pale green | light blue | red and white | blue and yellow | green and gold | pink and gray | little | special | pretty
where: name
  near the river | by a quiet lake | at the edge of the forest | at the foot of a hill | beside a wide meadow | near an old mill | by the sea
  at the end of a long road | next to a stream | in a green valley | not far from the woods | on the sunny side of a hill
hair: name
  curly hair | long brown hair | short black hair | red hair | golden hair | freckles | rosy cheeks | big brown eyes | a gap between two teeth
house: name
  house | cottage | village | town | cabin | farmhouse
cozy: name
  small | quiet | cozy | pretty | little | warm
day: name
  sunny | warm | bright | lovely | beautiful | clear | fine | golden | mild | quiet | fresh
time: name
  morning | afternoon | day
P: noun; call
  mom; Mom | dad; Dad | mother; Mother | father; Father | grandma; Grandma | grandpa; Grandpa | mommy; Mommy | daddy; Daddy | granny; Granny
animal: name; den; look
  rabbit; burrow; floppy ears | fox; den; a bushy tail | bear; cave; thick brown fur | squirrel; tree house; a fluffy tail
  hedgehog; nest; soft little spines | dog; kennel; floppy ears | cat; house; long whiskers | lion; cave; a golden mane | hamster; burrow; round cheeks
  panda; grove; black and white fur | monkey; tree house; a long tail | mole; tunnel; a pink nose | raccoon; hollow tree; a striped tail
  badger; burrow; a striped face | koala; tree house; round fuzzy ears | wolf; den; thick gray fur
light: noun; use
  ball; bounce it | kite; look at its long tail | hat; wear it | scarf; wear it | umbrella; spin it | balloon; hold it by the string
  paper plane; throw it | cape; wear it | paper crown; wear it | flag; wave it | pinwheel; blow on it | frisbee; make it spin
  ribbon; make loops with it | toy parachute; let it float down
toy: noun; use
  teddy bear; hug it | doll; sing to it | drum; tap on it | toy boat; float it in puddles | toy truck; push it around | toy train; pull it along
  toy car; race it across the floor | book; look at the pictures in it | bell; ring it | whistle; blow it | puppet; make it dance
  toy robot; wind it up | lantern; carry it around | bucket; fill it with pebbles | jump rope; skip with it | yo-yo; make it go up and down
  spinning top; watch it twirl | flute; play it | music box; listen to it | toy wand; wave it | blanket; snuggle under it
  backpack; fill it with treasures | toy horse; gallop around with it | tambourine; shake it | marble; roll it | toy dinosaur; make it roar
  toy rocket; make it zoom | seashell; listen to it | wagon; pull it along
place: name; prep; sights; spots
  the park; in; the swings creaked, a fountain splashed; under a green bench, behind the tall slide, beside the fountain, next to the swings
  the garden; in; bees hummed around the roses, tomatoes grew in neat rows; under a rose bush, behind the watering can, between two pumpkins, by the gate
  the forest; in; tall trees whispered, soft moss covered the ground; inside a hollow log, under a pile of leaves, behind a mossy rock, by an old oak
  the beach; on; small waves rolled over the sand, seagulls called; behind a sand dune, under a striped towel, beside a tide pool, next to some seaweed
  the farm; on; hens pecked at the ground, a sleepy cow chewed grass; in a pile of hay, behind the red barn, beside the water trough, under a tractor
  the meadow; in; wild flowers swayed, crickets sang; in the tall grass, under a blueberry bush, behind a big stump, beside a patch of clover
  the lake; by; ducks paddled in a line, dragonflies danced over the water; under a willow, behind some reeds, beside an upturned boat, next to the dock
  the hill; on; the wind was soft, the view was wide; behind a round stone, under a pine tree, in a small ditch, beside a bramble bush
  the market; at; people sold bread and honey, bright tents stood side by side; under a fruit cart, behind a sack of flour, between two baskets, by a tent
  the orchard; in; apples hung from every branch, the leaves rustled; under a pear tree, behind a ladder, inside an empty barrel, by a stone wall
  the playground; at; the seesaw went up and down, the slides shone in the sun; in the sandbox, under the seesaw, behind the ladder, beside the merry-go-round
  the river; by; fish jumped, the water gurgled; between two stones, under the little bridge, behind some cattails, beside a fallen tree
  the village square; in; people came and went, pigeons strutted about; under a cart, behind the well, beside the bakery door, next to the clock tower
  the castle ruins; in; ivy covered the walls, lizards sat in the sun; behind a broken wall, under a stone step, inside an old oven, by the gate
  the pond; by; frogs croaked, water lilies bloomed; between the reeds, under a fern, behind a wet log, beside a heap of stones
  the field; in; poppies glowed, a scarecrow waved its arms; behind a haystack, under a hedge, in a furrow, beside the scarecrow
H: name
  old owl | kind duck | green frog | wise turtle | gray goose | little robin | gentle horse | patient donkey | friendly farmer | kind baker
  old gardener | cheerful shepherd | tall fisherman | clever crow | quiet heron | chubby otter | old woodcutter | white swan | smiling painter
  elderly sailor
reach: name; how
  tall giraffe; stretched its long neck up to the branch | little robin; flew up and gave a little push
  friendly farmer; leaned a ladder against the trunk and climbed up | young elephant; lifted its long trunk and reached into the leaves
  clever crow; flapped up and pulled with all its might | kind gardener; reached up with a long rake
  tall sailor; climbed the trunk as if it were a mast | noisy parrot; hopped from branch to branch and gave a kick
ferry: name; how
  busy beaver; pushed a long log across the water | gentle horse; let them ride over on its broad back | white swan; pulled an old raft to the shore
  old fisherman; rowed them across in a small boat | strong woodcutter; laid a wide plank over the water
  giant turtle; let them ride over on its hard shell | young elephant; laid a tall tree trunk across the water
  friendly otter; showed them a place where the water was low
trouble: name; state; fix; thanks
  baby bird; had fallen out of its nest; made a bed of soft leaves and lifted it home; chirped
  little duckling; was stuck in the mud; laid a board on the mud and pulled gently; quacked
  small turtle; lay on its back and could not turn over; turned it over with a smooth stick; nodded slowly
  tiny ladybug; had fallen into a puddle; held out a leaf until it could climb on; wiggled its feelers
  lost lamb; could not find its mother; followed the sound of bells to the other sheep; bleated
  green frog; was trapped under a bucket; lifted one side and held it up; croaked
  blue butterfly; was caught in a web; pulled away the threads one by one; fluttered its wings
  young goat; was tangled in a rope; untied every knot; bleated
  baby owl; could not find its way home; carried it from tree to tree until it knew its own; hooted
  little bee; was too tired to fly; brought it a drop of honey on a petal; buzzed
  tiny mouse; had a thorn in its paw; pulled out the thorn and wrapped a leaf around the paw; squeaked
  yellow chick; was stuck behind a fence; made a little hole under the fence; peeped
  old snail; could not get over a wall; built a ramp of earth; waved its feelers
build: name; stuff; bad; fix
  tower; wooden blocks; leaned over and fell down with a crash; made the bottom much wider
  castle; big boxes; fell over on one side; put the largest boxes below
  fort; blankets and pillows; sank down in the middle; put two chairs under it
  hut; branches and leaves; came down with a rustle; tied the branches together
  little bridge; sticks and stones; broke in the middle; put the longest sticks first
  tent; an old sheet; blew away in the wind; put a heavy stone on each corner
  swing; a board and some rope; came down with a bump; tied each knot twice
  bird house; small boards; fell apart in the middle; used longer nails
  stage; planks and barrels; broke with a loud crack; chose thicker planks
  cart; a box and four wheels; lost a wheel and tipped over; put the wheels on tight
  robot; boxes and string; lost its head at the first step; used more string and a lot of glue
  windmill; paper and sticks; tipped over and broke; made the bottom heavier
skill: name; ing; bad; tip
  whistle; whistling; only air came out; Make your lips small and round
  swim; swimming; water splashed everywhere; Kick your legs and breathe slowly
  skate; skating; both feet slid away; Bend your knees and look ahead
  juggle; juggling; all the balls fell to the ground; Start with two and watch them in the air
  tie a bow; tying bows; the bow came apart; Make one loop and then another
  do a cartwheel; doing cartwheels; everything went upside down; Look at one spot on the ground
  dance; dancing; both feet got mixed up; Listen to the music and count to four
  sew; sewing; the thread became a big knot; Use a shorter thread
  knit; knitting; the wool rolled away; Hold the needles close together
  play the piano; playing the piano; it sounded like falling pots; Learn one small tune first
  ride a scooter; riding the scooter; the scooter tipped over; Look where you want to go
  catch a ball; catching; the ball flew past; Keep your eyes on it all the time
  write letters; writing; the letters came out upside down; Draw each line slowly
  walk on stilts; walking on stilts; the stilts went in two directions; Take very small steps
  skip stones; skipping stones; every stone sank with a plop; Use a flat stone and throw it low
  row a boat; rowing; the boat went around in a circle; Pull both oars at the same time
fear: name; start; tip; step
  the dark; the path led into a dark tunnel; The dark is only the day taking a nap; felt their way along the wall and sang
  thunder; the sky went boom; Thunder is only the clouds playing drums; clapped along with each boom
  deep water; the path ended at a deep pool; Water holds you up if you lie still; held hands and stepped in slowly
  high places; the path went up a steep cliff; Look at your next step and not at the ground; climbed up one step at a time
  loud noises; a band marched by with big drums; A loud noise cannot touch you; hummed a song to the beat of the drums
  spiders; a spider came down on a thread; A spider is only a small weaver; watched it spin its web
  bees; a bee landed on a flower nearby; A bee is only looking for lunch; stood still and let it fly by
  the old bridge; they had to cross the old bridge; Hold the rope and look ahead; walked across very slowly
  shadows; a big shadow moved over the path; A shadow needs a light and a friend; waved at the shadow until it waved back
  caves; the trail led into a cave; A cave is a house made of stone; lit a lamp and went in together
  snakes; a thin green snake slid over the path; A snake wants to be left alone; waited until it was gone
  the wind; the wind began to howl; The wind is only singing; sang back as loudly as they could
bake: name; main; bad; fix
  apple pie; apples; the pie was burned and black; watched the oven the whole time
  carrot cake; carrots; the cake was as flat as a plate; remembered the eggs
  banana cake; bananas; the cake was as hard as a stone; measured the flour with a cup
  berry tart; berries; the tart was far too salty; used sugar and not salt
  honey cake; honey; half of the batter was on the floor; stirred much more slowly
  pumpkin pie; pumpkin; the pie fell apart; let the pie cool on the window sill
  lemon cake; lemons; the cake was as sour as vinegar; added two spoons of sugar
  cherry pie; cherries; there were stones in every bite; took every stone out of the cherries
  nut cake; nuts; the cake was still wet inside; waited until the clock rang
  plum cake; plums; the cake stuck to the pan; put butter in the pan
gift: name; how
  card with pressed flowers; glued each petal in place | necklace of seashells; put the shells on a long string
  crown of daisies; wove the stems together | painted stone; painted a tiny sun on the stone | little paper lantern; cut little stars into the paper
  warm scarf; knitted row after row | picture of a rainbow; used every color in the box | jar of strawberry jam; stirred the pot with a wooden spoon
  wooden boat; rubbed the wood until it was smooth | sock puppet; sewed on two buttons for eyes
  bracelet of beads; tied a knot after each bead | book of funny drawings; filled every page
plant: name; end
  sunflower; as tall as the door | pumpkin; as round as the moon | rose bush; full of red roses | bean plant; taller than the wall
  strawberry plant; full of sweet berries | tomato plant; heavy with tomatoes | watermelon; too big to lift | tulip; the color of fire
  pea plant; covered with fat pods | lavender bush; full of bees
noise: name; cause
  soft scratching sound; a branch that brushed the window | strange tapping sound; rain that dripped into a bucket
  low humming sound; a beehive under the roof | quiet rustling sound; a hen that had made a nest | sad whistling sound; the wind in an empty bottle
  squeaky sound; an old gate that swung in the wind | rattling sound; a loose pan on the shelf | thumping sound; an apple tree that dropped its apples
  tiny chirping sound; a cricket behind the stove | long hooting sound; an owl that called to its children
broken: name
  vase | teapot | flower pot | lamp | plate | sugar bowl | clock | honey jar | picture frame | glass bird
treat: name
  cookies | berries | pancakes | sandwiches | muffins | apple slices | grapes | buns | peaches | nuts | crackers | waffles
"""

RULES = """
O:
  {O}
  {O}
  {O.noun}
H:
  {H}
  {H.last}
reach:
  {reach}
  {reach.last}
ferry:
  {ferry}
  {ferry.last}
trouble:
  {trouble}
  {trouble.last}
likes:
  to (run|skip|hop|roll) (in the grass|in the leaves|down the hill)
  to (sing|hum) (silly|happy|sweet|funny) songs
  to (chase|watch|count) (butterflies|birds|clouds|snails|ants|dragonflies)
  to (splash|jump|stomp) in (puddles|the mud|the rain)
  to (pick|smell|draw|water) (flowers|daisies|the roses|the tulips)
  to (collect|find|look for) (shiny|smooth|tiny|pretty|odd) (stones|shells|pebbles|feathers|acorns)
  to (draw|make up stories about|dream about) (dragons|castles|whales|pirates|the moon|trains|giants|talking trees)
  to help {A.his} {P} (in the garden|in the kitchen|carry water|cook soup|sweep the floor)
  to eat (ripe|sweet|juicy|fresh) (apples|pears|berries|plums|melons)
  to (ask|think about) (hard|funny|strange|clever) questions
open:
  Once upon a time, there was {A.a} named {A}. {A.He} (loved|liked) <likes>.
  Once upon a time, (in {A.home}, there lived|there lived) {A.a} (called|named) {A}. {A} (loved|liked) <likes>.
  Once there was {A.a} named {A}. (Every day|Each morning|After breakfast), {A.he} (liked|loved|wanted) <likes>.
  There (once was|was once) {A.a} (called {A}|whose name was {A}). {A} lived in {A.home}.
  {A} was {A.a} who lived in {A.home}. {A.He} (loved|liked) <likes>.
  {A} was {A.a}. {A.He} lived in {A.home} with {A.his} {P}.
  {A} was {A.a} (with {A.look}|who loved <likes>). {A.He} lived with {A.his} {P} in {A.home}.
  In {A.home}, there lived {A.a} named {A}. (Everyone knew|The neighbors knew|All could see) that {A} (loved|liked) <likes>.
  Long ago, {A.a} named {A} lived in {A.home}. {A.He} had {A.look} and a (big|warm|bright|shy) smile.
  This is a story about {A.a} named {A}. {A} (loved|liked) <likes>, and {A.he} (always|often) had a (song|joke|smile|story) to share.
  {A} and {A.his} {P} lived in {A.home}. {A} was {A.a}, and {A.he} loved <likes>.
  Once upon a time, {A} and {A.his} {P} lived in {A.home}. {A} was {A.a} (with {A.look}|who liked <likes>).
brave:
  <open>
  Once upon a time, there was a (brave|kind) {A.kind} named {A}. {A} was (never|not) afraid to (try new things|help others|ask questions|meet
      strangers).
  {A} was a (brave|kind|helpful) (little|young) {A.kind}. {A.He} lived in {A.home} and loved <likes>.
  {A} was a (brave|kind|helpful) {A.kind}. Everyone (loved|liked|trusted) {A} because {A.he} (was always ready to help|never gave up|had a big heart).
toy:
  {A} had {O.a}. It was (a gift from {A.his} {P}|{A.his} favorite thing in the world|new and very nice), and {A.he} (loved|liked) to {O.use}.
  {A.His} (favorite|dearest) thing was {O.a}. {A} took it (everywhere|to bed each night|along on every walk).
  For {A.his} birthday, {A} got {O.a} from {A.his} {P}. "Thank you! I love it," {A.he} said.
  One day, {A.his} {P} gave {A} {O.a}. {A.He} (jumped|danced|spun around) with joy and began to {O.use}.
  {A} (loved|liked) {A.his} {O} (very much|more than anything|most of all). {A.He} would {O.use} (every day|all day long|from morning to night).
  {A} kept {O.a} (beside {A.his} bed|on a shelf|under {A.his} pillow). (Every morning|After lunch|Each day), {A.he} liked to {O.use}.
play:
  {A} was playing with the {O.noun} {at}. It was {O.a}, and {A.he} (loved|liked) to {O.use}. {A} was {A.a} who loved <likes>.
  One {day} {time}, {A} was playing with {A.his} {O} {at}. {A.He} was {A.a}, and {A.he} lived in {A.home}.
  {A} was playing {at} with {O.a}. It was a gift from {A.his} {P}. {A.He} was {A.a} with {A.look}.
  It was {day.a} {time}. {A.A} named {A} was (playing|sitting|walking) {at} with {O.a}. {A.He} (loved|liked) to {O.use}.
  Once upon a time, {A.a} named {A} was playing with {O.a} {at}. {A.He} liked to {O.use}.
fun:
  <scene> {A} was having a (wonderful|great|lovely|very good) time.
  {A} (laughed|smiled|sang) and played (for a long time|until {A.his} cheeks were warm|and forgot about everything else).
  <scene> "(What a nice day|This is fun|I could play all day)!" {A} (said|thought|laughed).
  {A} (played|had fun) for (an hour|half an hour|a long time). <scene>
scene:
  (The sun was|The air was) warm, and (the birds sang|a soft wind blew|the flowers smelled sweet|white clouds floated by).
  The sky was (blue|clear|bright), and {sight}.
  All around, {sight}.
  It was (calm|peaceful|lovely) there, and {sight}.
go:
  One {day} {time}, {A} (went|walked|skipped|ran) to {place}, where {sight}.
  One {day} {time}, {A} and {A.his} {P} (went|walked) to {place}. <scene>
  On (Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday), {A} (went|walked|skipped) to {place}. <scene>
  It was {day.a} {time}, so {A} (went|walked|skipped|hurried) to {place}. <scene>
  "(Can we go to|May we go to|Will you take me to) {place}(, please|)?" {A} asked {A.his} {P}. "(Yes|Of course|What a good idea)," said {P.call}, and
      off they went.
go.toy:
  One {day} {time}, {A} took the <O> to {place}, where {sight}.
  One {day} {time}, {A} went to {place} and brought the <O> along. <scene>
  It was {day.a} {time}. {A} carried the <O> (all the way |)to {place}. <scene>
  On (Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday), {A} wanted to play {at}. {A.He} took the <O> and (ran|hurried|skipped|set) off.
  "(I will take|I am taking) my <O> to {place}," {A} told {A.his} {P} one {day} {time}. "Have fun(, dear|, my dear|)," said {P.call}.
glad:
  (happy|happy|glad|pleased|cheerful)
sad:
  (sad|upset|unhappy|gloomy|worried)
cried:
  (shouted|cheered|called|cried|exclaimed|laughed)
sighed:
  (sighed|whispered|said sadly|cried|said in a small voice|mumbled)
said:
  (said|answered|replied)
alas:
  "(Oh no|Oh dear)! (Where is my <O>?|My {O} is gone!)" {A} (cried|gasped|shouted).
  {A} felt very <sad>. "(My {O} is gone|I lost my <O>|I have lost it)," {A.he} <sighed>.
  {A} (felt|was) so <sad> that (tears came to {A.his} eyes|{A.his} eyes filled with tears|{A.he} sat down and cried).
  {A} looked at {A.his} empty {A.hands}. {A.He} wanted to cry.
  A (big|fat|single) tear rolled down the nose of poor {A}. {A.He} missed the <O> (already|so much).
lose:
  {A} put the <O> down to (chase a butterfly|pick some flowers|have a drink of water|look at a beetle). When {A.he} came back, (it was gone|it was not
      there anymore).
  After a while, {A} reached for the <O>, but it was (gone|not there|nowhere to be seen).
  {A} ran so fast that the <O> slipped out of {A.his} {A.hands}. {A.He} did not (notice|see it fall) until much later.
  When it was (time for lunch|time to rest|time to go home), {A} could not find the <O> anywhere.
  {A} stopped to (watch the clouds|look at a snail|smell a rose|eat some {treat}). When {A.he} turned around, the <O> had (vanished|disappeared).
  {A} (took a short nap|fell asleep in the sun). When {A.he} woke up, the <O> was (gone|missing).
search:
  {A} looked {spot2}, but the <O> was not there. {A.He} looked {spot3} and found (only|nothing but) (an old shoe|a heap of leaves|a sleepy cat|a
      broken cup|a lot of dust).
  {A} (searched|looked) (high and low|everywhere|for a long time). {A.He} even looked {spot2}. Nothing!
  First {A} looked {spot2}. Then {A.he} looked {spot3}. The {O} was (not there|nowhere to be found).
  "I must (find it|look for it)," {A} (said|thought). {A.He} (crawled|peeked|searched) {spot2}, but (it was no use|there was nothing|{A.he} saw only
      ants).
comes:
  Just then, {A.his} friend {B.full} (came by|walked over|ran up).
  (Soon|A little later|After a while), {B.full}, (a good friend of {A}|who lived nearby), (came by|walked over|came along).
  {A.His} (good|best|dear) friend {B.full} (heard {A}|saw {A}) and came (over|closer|running).
  Then {B.intro} came (by|along|over).
ask:
  "(Why are you so <sad>|What is wrong|What happened|Can I help)?" asked {B}.
  {B} (sat down|stopped|stood still) and asked, "(What is the matter|What is wrong|Why do you look so <sad>)?"
  "(Hello|Hi|Hey)! (You look <sad>|You do not look happy)," said {B}. "What happened?"
offer:
  "I lost my <O>," {A} <sighed>. "(Do not worry|Do not cry|Cheer up). (I will help you|We can look together|Four eyes see more than two)," <said> {B}.
  {A} told {B} about the <O>. "(Oh no|I will help you look|Then we must search together)!" <said> {B}.
  "It is my <O>. I cannot find it," {A} <sighed>. {B} (nodded|smiled|thought for a moment) and said, "(Let us look together|I have good eyes|I know
      where to look)!"
found:
  {B} looked {spot}. "(I see it|Here it is|Come quick)!" {B.he} <cried>. It was the <O>!
  They looked {spot}, and there was the <O>! It was (a bit dusty|a little wet|covered with ants), but {A} did not mind.
  Then {A} saw something {spot}. "(Look|There it is|I found it), {B}!" {A} <cried>. It was the <O>!
  They followed (some tiny footprints|a line of ants|the little path) until they saw the <O>. It was {spot}, (safe and sound|just waiting for them).
  "Let us look {spot}," said {B}. They did, and the <O> was (right there|lying there)!
found.help:
  {H.A} (came by|heard {A}|stopped to listen). "(Did you lose|Are you looking for|Is this about) {O.a}? I saw it {spot}," said the <H>. {A} ran there,
      and there it was!
  {A} met {H.a}. "Have you seen my <O>?" {A.he} asked. "(Yes|I have|I think so). Look {spot}," <said> the <H>. {A} looked, and there was the <O>!
  Then {H.a} called out, "(Is this yours|Does this belong to you)? I found it {spot}!" It was the <O>! {A} (clapped|jumped for joy|smiled a big
      smile).
end.toy.help:
  "Thank you(| so much| very much)!" {A} <cried>. {A.He} gave the <H> some {treat}, and they sat {at} and looked at the <O> together.
  {A} (hugged|kissed|patted) the <O> and thanked the <H>. (From then on|After that day|From that day on), {A.he} took (good|better|great) care of it.
  The <H> (smiled|nodded|winked). "Take good care of your <O>." "I will," {A} promised, and {A.he} (kept|never forgot) that promise.
end.toy:
  {A} hugged the <O> and then {A.he} hugged {B}. They played with it until (the sun went down|it was dinner time|the first star came out).
  "Thank you, {B}! You are a (good|true|great) friend," {A} said. They took turns with the <O> and (laughed|sang|giggled) all the way home.
  {A} held the <O> and was so <glad>. {A.He} let {B} {O.use} too. That night, {A} fell asleep with it (close by|in {A.his} arms|next to {A.his}
      pillow).
  {A} thanked {B} and shared some {treat}. From that day on, {A} (always kept|never lost|always looked after) the <O>.
  They (ran|walked|skipped) home (together|side by side). "(Tomorrow|Next time), we can play with the <O> again," {A} said, and {B}
      (smiled|nodded|agreed).
moral.friend:
  {A} learned that (good friends help each other|a friend makes every day better|it is good to ask for help|trouble is smaller when two carry it).
  {A} knew now that (a friend is the best treasure|friends are worth more than toys).
  And so {A} and {B} (stayed|were) (best|good|close) friends (forever|for many years|from that day on).
  (They lived happily ever after.|It was the best day of all.|What a good day it was!|Both of them were very <glad>.)
  {A} and {B} (felt|were) (very |so |)<glad>.
moral.alone:
  {A} learned to (never give up|keep calm and think|ask for help|look after {A.his} things).
  That night, {A} (told {A.his} {P} all about it|slept very well|had sweet dreams|smiled in {A.his} sleep).
  (It had been a long day, but a good one.|The end.|It was a day to remember.|What a day it was!)
  It was the best day (of the week|in a long time|of the whole summer).
plot lost with a friend:
  <brave> <toy> / <go.toy> <lose> <alas> / <search> <comes> <offer> / <found> <end.toy>
  <play> / <fun> <lose> <alas> / <search> <comes> <ask> <offer> / <found> <end.toy>( <moral.friend>|)

plot lost with a helper:
  <brave> <toy> / <go.toy> <lose> <alas> / <search> <found.help> / <end.toy.help> <moral.alone>
  <play> / <fun> <lose> <alas> / <search> <found.help> / <end.toy.help> <moral.alone>

want:
  {B} saw the {O}. "(Can I|May I|Could I) {O.use}(, please|)?" {B.he} asked.
  "(Wow|Oh), what a (nice|fine|lovely) {O.noun}! (Can I try it|May I hold it|Can we play with it together)?" asked {B}.
  {B} looked at the {O} with (big|bright|wide) eyes. "(Can I have one too|Can I play too|May I have a turn)(, please|)?" {B.he} asked.
refuse:
  "No! It is (mine|my <O>)!" {A} (shouted|said) and held it tight. {B} (looked down|walked away|went to sit alone) with a (sad|gloomy|long) face.
  {A} shook {A.his} head. "(Not now|No, you may break it|I do not want to share)," {A.he} said. {B} was very <sad>.
  {A} hid the <O> behind {A.his} back. "(Go away|Find your own|I got it first)," {A.he} said. {B} (began to cry|turned and left|said nothing at all).
regret:
  {A} went on playing, but it was (not fun anymore|boring all alone|too quiet). {A.He} thought of {B} and felt (bad|sorry|ashamed).
  {A.s} {P} had seen it all. "How would you feel if {B} did not share with you?" asked {P.call}. {A} thought about it (and felt sorry|for a long
      time).
  Soon {A} felt lonely. "{B} is my friend, and I was (mean|unkind|not nice)," {A.he} (thought|said softly).
  Then {A} fell and (hurt {A.his} knee|bumped {A.his} nose). {B} helped {A} up and (walked|went) off again without a word. {A} felt (ashamed|very
      sorry).
share:
  {A} (went|walked|ran) to {B}. "I am sorry. (Here is my <O>|Please take a turn with my <O>|Let us play together with the <O>)," {A} said.
  {A} ran after {B} (and held out|with) the <O>. "(I was wrong|I am sorry), {B}. (You can go first|It is your turn|We can share it)," {A} said.
  "{B}, (wait|please come back)! I want to share my <O> with you," {A} called. {B} (smiled|came back|jumped up) at once.
share.end:
  {B} was so <glad>! They took turns with the <O>, and it was (twice as much fun|much more fun than before|the best game of all).
  {A} and {B} played with the <O> (for hours|until the sun went down|all {time}). Then {B} shared some {treat} with {A}.
  They laughed and played with the <O> {at}. {B} gave {A} a (hug|big hug|warm smile), and {A} felt (warm inside|much better).
moral.share:
  {A} learned that (sharing is fun|it is nice to share|a toy is more fun with a friend|a kind heart makes friends).
  From then on, {A} (always|gladly|often) shared {A.his} (toys|things) with (others|{B}|everyone).
  (It feels good to share.|When you share, you have twice the fun.|Sharing made them both <glad>.)
plot share:
  <open> <toy> / <go.toy> <comes> <want> <refuse> / <regret> <share> / <share.end>
  <play> / <fun> <comes> <want> <refuse> / <regret> <share> / <share.end> <moral.share>

lonely:
  But {A} (was lonely|had no one to play with|did not have many friends). {A.He} wished for (a friend|someone to talk to|a friend to play with).
  {A} was new there and (did not know anyone|knew no one). "(I wish I had a friend,|Who will play with me?|How can I find a friend?)" {A.he}
      (wondered|thought).
  Still, {A} often played alone, and some days {A.he} felt sad.
shy:
  There {A} saw {B.intro}. {B} was sitting (alone |all alone |){spot}. {A} wanted to say hello, but {A.he} was too shy.
  {B.Intro} was (playing|sitting|standing) {spot}. {A} waved, but {B} (looked away|hid {B.his} face|did not wave back).
  {A} heard someone (sniff|sing softly|cough) {spot}. It was {B.intro}. "Do not look at me," {B} whispered, for {B.he} was very shy.
meet:
  {A} took a deep breath. "(Hello|Hi), my name is {A}. (What is your name|Do you want to play|Would you like to see my <O>)?" {A.he} asked.
  {A} had an idea. {A.He} put the <O> (on the ground|in the grass) between them and (stepped back|sat down|waited).
  {A} sat down with the <O> and began to {O.use}. Little by little, {B} came closer to see the <O>.
  "I am {A}. I am shy too," {A} said. "But I have {O.a}. (Would you like to try it|Do you want to hold it)?"
meet.end:
  "I am {B}," said {B}, and {B.he} (smiled|giggled|laughed). They played with the <O> all {time} long.
  {B} (touched|picked up|looked at) the <O> and smiled. "(I like it|It is so nice|I like you)! My name is {B}," {B.he} said. Soon they were
      (playing|laughing) together.
  Then {B} (smiled and |)took some {treat} out of a (bag|basket). They (ate and talked|shared them) and played with the <O> until (it got dark|the sun
      went down).
plot new friend:
  <open> <lonely> / <go> {A} had brought {O.a} from home. <shy> / <meet> / <meet.end> <moral.friend>
  <open> <toy> <lonely> / <go.toy> <shy> / <meet> / <meet.end>( <moral.friend>|)

bake.why:
  (One day, it|It) was the birthday of {A.his} friend {B.full}. "I will bake {bake.a} for {B}," {A} (said|told {A.his} {P}).
  {A.His} friend {B.full} was (sick|<sad>|tired from a long trip). "{bake.A} would make {B} smile," {A} (said|thought).
  {A} wanted to (surprise|thank) {A.his} friend {B.full}. "(Can|May) I bake {bake.a} for {B}?" {A} asked. "Yes, you can," said {P.call}.
bake.try:
  {A} took flour, butter and {bake.main}, and mixed them in a (big|blue|round) bowl. But (oh no|oh dear), {bake.bad}!
  First {A} washed {A.his} {A.hands}. Then {A.he} mixed everything (quickly|in a hurry|without looking). In the end, {bake.bad}.
  {A} (put on an apron and sang|worked very fast|stirred and stirred). There was flour (everywhere|on the floor|on {A.his} nose). But then {bake.bad}!
bake.sad:
  "I (cannot do it|ruined it|did it all wrong)," {A} <sighed>. "(Everyone makes mistakes|It is only the first try|Let us try once more)," said {A.his}
      {P}.
  {A} (wanted to cry|sat down on the floor|hid {A.his} face). {P.call} gave {A} a (hug|kiss|warm smile). "(We can try again|A cook must be patient|I
      once did the same)."
  {A} felt <sad>, but {A.his} {P} (laughed kindly|smiled). "(Slow down|Take your time|Go step by step) and do it again."
bake.again:
  This time, {A} (went slowly|was careful|did not hurry). {A.He} {bake.fix}. (Soon|Before long), the kitchen smelled (wonderful|sweet|so good).
  So {A} tried again. {A.He} {bake.fix}, and the {bake} came out (golden and soft|just right|perfect).
  They began again with fresh {bake.main}. {A} {bake.fix}. "It (looks|smells) (great|lovely|perfect)!" {A.he} <cried>.
bake.end:
  {A} brought the {bake} to {B}. "(Is this for me|Did you make this)?" asked {B}. {B.He} took a big bite. "(Yum|Mmm), it is (delicious|the best {bake}
      ever)!"
  When {B} saw the {bake}, {B.he} (clapped|jumped up|smiled) with joy. They ate it together (in the garden|at the table|under a tree), down to the
      last crumb.
  {B} ate three pieces of the {bake} and (licked {B.his} lips|asked for more). "Thank you, {A}! You are so kind," said {B}.
moral.try:
  {A} learned that (it is good to try again|nobody gets it right the first time|mistakes help us learn|slow work is good work).
  {A} was very (proud|<glad>). {A.He} had not given up.
  (Never give up after one try!|If at first it goes wrong, try again.|It was worth the hard work.|Practice makes things better.)
  That (night|evening), {A} (went to bed with a smile|dreamed sweet dreams|told {A.his} {P} the whole story again).
plot bake:
  <open> <bake.why> / <bake.try> <bake.sad> / <bake.again> / <bake.end>( <moral.try>|)

build.plan:
  One {day} {time}, {A} and {A.his} friend {B.full} met {at}. "Let us build {build.a}!" said {A}.
  One {day} {time}, {A} wanted to build {build.a} {at}. {A.He} asked {A.his} friend {B.full} to help. "(Yes|Of course|Great idea)!" <said> {B}.
  {A.His} friend {B.full} came to play {at}. "(I have an idea|I know what we can do)," {A} said. "We can build {build.a}!"
build.try:
  They (found|gathered|brought) {build.stuff} and began (to work|at once). {A} worked (fast|hard), and {B} (sang|counted|helped). But the {build}
      {build.bad}!
  {B} brought {build.stuff}. {A} (pushed|pulled|hummed) and {B} held everything still. (Suddenly|All at once|In the end), the {build} {build.bad}.
  They took {build.stuff} and worked (all {time}|for an hour|without a rest). Just when they were (done|almost done), the {build} {build.bad}.
build.sad:
  "(It is all your fault|You did that), {B}!" {A} shouted. {B} looked <sad>. Then {A} said, "I am sorry. I was just (sad|angry|tired)."
  "(Oh no|All that work for nothing|We will never do it)!" {A} <sighed>. {B} (sat down|kicked a stone|looked <sad> too).
  {A} felt like giving up. But {B} said, "(Let us think|We can fix it|It was a good start)."
  {B} began to cry. {A} put an arm around {B}. "(We can do it better|Do not cry|Let us start again)," {A} said.
build.help:
  {H.A} (had watched them|came by). "(Why not try it another way|Go slowly and think first|A good {build} takes time)," said the <H>. So they
      {build.fix}.
  {A} (thought hard|had an idea|drew a plan in the dust). This time, they {build.fix}.
  They asked {A.s} {P} what to do. {P.call} (gave them a hint|showed them how), and they {build.fix}.
  "(I think|Maybe) we did it wrong," said {B}. "Let us ask someone." {H.A} gave them a hint, and they {build.fix}.
build.end:
  Now the {build} was (perfect|strong|as good as new)! {A} and {B} (danced around it|cheered|clapped). They (gave it a name|showed it to everyone|were
      very proud of it).
  At last, the {build} was (done|ready). "We did it( together|, you and I| at last)!" {A} <cried>, and {B} (laughed|cheered|hugged {A}).
  The {build} (was finished|was ready) before dinner. {A} and {B} sat (beside|next to) it, ate some {treat} and felt (proud|<glad>).
moral.team:
  {A} and {B} learned that (two can do more than one|it is best to work together|a good plan helps a lot|a mistake is not the end).
  (Working together is fun!|Together they could do anything.|It was the best {build} in the whole land.)
  The next day, they (came back to|played with|looked after) the {build}.
plot build:
  <open> / <build.plan> <scene> <build.try> / <build.sad> <build.help> / <build.end> <moral.team>

cross.why:
  One {day} {time}, {A} and {A.his} friend {B.full} wanted to (visit a friend|pick berries|see the fair|fly a kite) on the other side of the river.
  {A} and {A.his} friend {B.full} heard (music|a bell|laughter) from across the river. "(There must be a party|Let us go and see)!" {A} said.
  The (ripest|sweetest) <treat.wild> grew across the river. One {day} {time}, {A} and {A.his} friend {B.full} (set off|went) to get some.
  {A} had to bring a (letter|basket of eggs|warm coat|pot of soup) to a neighbor across the river. {A.His} friend {B.full} came along.
treat.wild:
  (berries|plums|apples|cherries|nuts)
cross.stop:
  But the bridge was (broken|gone|washed away). The water was (deep|fast|cold), and there was no other (way|path).
  But when they came to the river, the water was (high|wild|very fast). "(How will we get across|What do we do now)?" asked {B}.
  Halfway there, it began to rain. The river grew (wider|bigger and louder), and the old bridge (broke in two|floated away).
cross.try:
  {A} tried to jump from stone to stone, but the stones were (slippery|too far apart|wet). Splash! {A.He} fell in, and {B} pulled {A} out.
  {A} and {B} tried to (float on a log|make a boat of leaves|wade through the water), but it (rolled over|was no good|did not work). They were wet and
      cold.
  {B} threw a rope to the other side, but it (fell into the water|was too short). {A} tried too, and {A.he} could not do it.
cross.help:
  {ferry.A} (saw them|heard them). "(May I help you|Do you need help|Do you want to cross)?" asked the <ferry>. {A} nodded. Then the <ferry>
      {ferry.how}.
  "(Help!|Is anyone there?|Hello! Hello!)" {A} called. {ferry.A} came (at once|to see). "(No problem|I can help)," <said> the <ferry>, and
      {ferry.how}.
  {A} asked {ferry.a} for help. "(Please|We are stuck)," {A.he} said. The <ferry> (nodded|smiled) and {ferry.how}.
cross.end:
  They were across! {A} and {B} (thanked|waved to|sang a song for) the <ferry> and (ran on|hurried on). They had a (wonderful|lovely|great) time.
  On the other side, {A} and {B} jumped for joy. They (shared their {treat}|made a crown of flowers and shared it) with the <ferry>.
  "We made it!" <cried> {B}. {A} gave the <ferry> a (hug|flower|big smile). "Thank you! We (could not have done it alone|will never forget you),"
      {A.he} said.
plot cross the river:
  <brave> / <cross.why> <cross.stop> / <cross.try> <cross.help> / <cross.end> <moral.friend>
  <brave> <cross.why> / <cross.stop> <cross.try> / <cross.help> / <cross.end> <moral.friend>

learn.want:
  {A} wanted to learn to {skill}. All {A.his} friends could do it( already|, even the small ones|, but {A} could not).
  One {day} {time}, {A} saw {A.his} friend {B.full} {skill}. It looked so (easy|nice|wonderful). "I want to {skill} too," {A} (said|thought).
  More than anything, {A} wanted to {skill}. "(Will you|Can you) teach me?" {A.he} asked {A.his} {P}.
learn.try:
  {A} tried, but {skill.bad}. {A.He} tried (again|once more), and {skill.bad} again.
  The first time, {skill.bad}. {A} (blushed|frowned|stamped {A.his} foot). The second time, it was (no better|even worse|the same).
  {A} took a deep breath and began. But {skill.bad}! (A crow laughed|Someone giggled|A snail went past and smiled), and {A} felt <sad>.
learn.sad:
  "I will never learn it," {A} <sighed>. {A.He} (sat down under a tree|went home|threw a stone into a puddle).
  {A} wanted to give up. "{skill.Ing} is too hard for me," {A.he} <sighed>.
  "(It is too hard|I am no good at this)!" {A} (cried|shouted|said). Tears ran down {A.his} face.
learn.tip:
  {A.s} {P} (sat down next to {A}|came over). "{skill.tip}," said {P.call}. "(And never give up|And try a little each day|I will stay with you)."
  {H.A} (had seen it all|came by). "(I could not do it at first|Listen to me)," said the <H>. "{skill.tip}."
  "May I tell you a secret?" asked {H.a}. "{skill.tip}. (That is all|It worked for me)."
learn.end:
  {A} (practiced|tried) (every day|all week|again and again). At last, {A.he} could {skill}! "(Look!|I can do it!|Did you see that?)" {A.he} <cried>.
  {A} did just that. It (went|worked) (a little |)better each time, and (by evening|on the third day|a week later), {A.he} could {skill} (very
      well|all alone|like a star).
  So {A} tried once more, (slowly|calmly|with care). And it worked! {A.He} (laughed|shouted with joy|jumped up and down). "I can {skill}!"
learn.more:
  {A.s} {P} (clapped|cheered) and brought {treat} for everyone.
  The next day, {A} showed {A.his} (little cousin|neighbor|friends) how to {skill} too.
  Now {A} loved {skill.ing} (more than anything|every day|most of all).
plot learn:
  <open> / <learn.want> <learn.try> / <learn.sad> <learn.tip> / <learn.end> <learn.more> <moral.try>

fear.have:
  {A} was (a happy {A.kind}|not afraid of much), but {A.he} was afraid of {fear}.
  There was just one problem. {A} was (very |so |)(afraid|scared) of {fear}.
  {A} had a secret. {A.He} was (afraid|scared) of {fear}, and {A.he} (had told nobody|did not like to talk about it).
fear.start:
  One {time}, {A} and {A.his} friend {B.full} were out for a walk when {fear.start}. {A} (shook|turned pale|froze|could not move).
  One {time}, {A} went for a walk with {A.his} friend {B.full}. (Suddenly|All at once|Then) {fear.start}! {A} (hid behind a tree|closed {A.his}
      eyes|wanted to run away).
  {A} was with {A.his} friend {B.full} when {fear.start}. "(Help|Oh no|I want to go home)!" {A} (cried|whispered|shouted).
fear.talk:
  "Are you (scared|afraid)?" asked {B}. "Yes," {A} <sighed>. "I am afraid of {fear}." {B} did not laugh. "{fear.tip}," {B} said.
  {B} took {A} by the {A.hand}. "(I was scared of {fear} once|You are safe|I am here)," said {B}. "{fear.tip}."
  {A} told {B} the truth. "(Everyone is afraid of something|Thank you for telling me)," <said> {B}. "My {P} always says: {fear.tip}."
fear.step:
  Together, they {fear.step}. At first, {A} (held on tight|shook a little|wanted to run). Then {A.he} felt (a bit |much |)braver.
  {A} took (a deep breath|three deep breaths), and they {fear.step}. It was not so bad(!| after all.| at all!)
  So they {fear.step}. {A} looked at {B} and began to (smile|laugh|feel calm). "(It is not so bad|I can do it)," {A} said.
fear.end:
  After that, {A} was not (so |)afraid of {fear} anymore. "(I was brave|I did it), {B}!" {A.he} <cried>.
  {A} was so (proud|<glad>). {A.He} ran home to tell {A.his} {P}. "(I am proud of you|How brave you are)," said {P.call}, and they ate {treat}
      together.
  When it happened again, {A} (smiled|winked) at {B}. {A} knew (what to do|that it would be all right|that a friend was near).
moral.brave:
  {A} learned that (being brave means trying even when you are scared|it helps to talk about fear|fear grows small when it is shared).
  (Even the brave are scared sometimes.|A friend can make you brave.|It is fine to be scared.)
  {A} felt (brave|strong|bigger) (after that|from then on|now).
plot fear:
  <open> <fear.have> / <fear.start> / <fear.talk> <fear.step> / <fear.end> <moral.brave>

cry:
  (Suddenly|Then|Soon|All at once), {A} heard a (soft|small|tiny|sad) (cry|voice|sound) (nearby|close by|not far away). It was {trouble.a}! It
      {trouble.state}.
  (On the way|After a few steps), {A} saw something move (close by|near the path|at the side of the path). "(What is that|Who is there)?" {A.he}
      asked. It was {trouble.a} that {trouble.state}.
  "(Help|Please help me)!" said a (small|soft|sad) voice. {A} (looked around|followed the voice) and found {trouble.a}. The poor thing
      {trouble.state}.
cry.talk:
  "(Poor little one|Do not be afraid|Do not worry)! (I will help you|I will not hurt you)," {A} said (softly|kindly|gently).
  {A} tried to help, but {A.he} (could not do it alone|did not know how|needed more {A.hands}). The <trouble> looked so <sad>.
  "(I must|I have to) do something," {A} (said|thought). The <trouble> (looked up|blinked|shook) and waited.
cry.friend:
  {A} ran to get {A.his} friend {B.full}. "(Come quick|Hurry), {B}! (Someone needs|The <trouble> needs) our help!" {A} (called|shouted|cried). {B}
      (came at once|ran as fast as the wind|dropped everything and came).
  {A.His} friend {B.full} (came by|was not far away). "(What are you doing|Can I help)?" asked {B}. "(I need your help|We have to hurry)," <said> {A}.
cry.fix:
  {A} and {B} {trouble.fix}. It took (a long time|some time|a while), but (it worked|they did not give up).
  Very carefully, they {trouble.fix}. "(Almost there|Just a little more|Easy now)," {A} (said|whispered).
  First they (made a plan|talked about it|took a deep breath). Then they {trouble.fix}. {A} (smiled|clapped) when it (was done|worked).
cry.end:
  The <trouble> was (safe|fine|well) again. It {trouble.thanks} as if to say thank you, and {A} and {B} (laughed|waved|smiled).
  The <trouble> {trouble.thanks} (happily|again and again|with joy). "(Goodbye|Take care), little friend!" {A} called.
  The <trouble> {trouble.thanks}. The next day, it (came back|was waiting) with (a shiny stone|a red berry|a feather|a flower|its whole family) for
      {A} and {B}.
moral.kind:
  {A} learned that (even small friends matter|it feels good to help|kindness always comes back|nobody is too small to help).
  {A} and {B} went home with (happy|warm|full) hearts.
  (It is good to be kind.|Helping others made them <glad>.|A little help can mean a lot.)
  {A.s} {P} was proud and gave them (both |){treat}.
plot help:
  <brave> / <go> <cry> <cry.talk> / <cry.friend> <cry.fix> / <cry.end> <moral.kind>
  <brave> <go> / <cry> <cry.talk> <cry.friend> / <cry.fix> / <cry.end> <moral.kind>

break:
  One {time}, {A} was (running|jumping|dancing) in the house with the <O>. {A.He} (hit|bumped into|knocked over) the (small |old |round |)table, and
      the {broken} fell down. Crash! It broke.
  One {time}, {A} took the <O> and wanted to {O.use} in the (kitchen|hall), but {A.his} {P} had said no. {A} did it anyway. Crash! The {broken} (fell
      off the shelf|fell to the floor) and broke.
  {A} knew that {A.he} should not play with the <O> in the kitchen. But {A} (did it anyway|did not listen). Bang! The {broken} fell and broke (in
      two|into small pieces).
hide:
  {A} was (scared|worried|ashamed). "(What will {P.call} say?|What have I done?|Oh no!)" {A.he} whispered. {A.He} hid the pieces (under the bed|behind
      the sofa|in a box).
  "(Maybe nobody will see|I will say it was the wind|I will not tell)," {A} thought, and {A.he} swept the pieces under the rug.
  {A} hid behind the (door|curtain|sofa) with the <O>, and {A.his} heart beat (fast|like a drum).
secret:
  Soon {P.call} came in. "Where is my {broken}?" {P.call} asked. {A} (looked down|said nothing|looked at the floor). {A.His} tummy (hurt|felt bad).
  All {time}, {A} could not play or eat. Even {treat} did not taste good. The secret felt (like a stone|heavy|so big).
  {A.His} friend {B.full} came to play. {A} told {B} the secret. "(You should tell the truth|Tell {P.call}. It will be all right|I will go with you),"
      <said> {B}.
truth:
  At last, {A} said, "(I broke it|It was me). I was playing with my <O>. I am (so |very |)sorry." A tear ran down {A.his} face.
  {A} (took a deep breath|could not wait any longer). "{P.call}, (I did it|it was my fault). I played with my <O> inside," {A.he} <sighed>.
  {A} went to {A.his} {P} and told the truth about the <O> and the broken pieces. "I am sorry," {A.he} <sighed>.
forgive:
  {P.call} gave {A} a hug. "(Thank you for telling the truth|It was brave to tell me|I am not angry). We can (fix|mend) it." They (used glue|glued the
      pieces) together.
  "I am (a little |)sad, but I am glad that you told me," said {A.his} {P}. Together, they (cleaned up|swept the floor|put it back together).
  {P.call} was quiet for a moment. "(Anyone can break a thing|Things can break). The truth is worth more," said {P.call}, and {A} felt
      (light|better|<glad>) again.
forgive.end:
  From then on, {A} (always|only) played with the <O> outside.
  After lunch, {A} took the <O> to {place} and played there (until dinner|in the sun|with a light heart).
  {A} put the <O> away and (made a card for {A.his} {P}|helped to wash the dishes|brought {P.call} a flower).
moral.truth:
  {A} learned (to tell the truth|that it is best to be honest|that the truth makes a heart light).
  (It is always good to tell the truth.|A secret is heavy, but the truth is light.)
  {A} slept well that night.
plot broken:
  <open> <toy> / <break> <hide> / <secret> <truth> / <forgive> <forgive.end>( <moral.truth>|)

picnic:
  One {day} {time}, {A} and {A.his} friend {B.full} (had|wanted to have) a picnic {at}. They (packed|brought) {treat}, {bake.a} and (a blanket|some
      lemonade|a jug of milk).
  "Let us have a picnic {at}!" {A} said to {A.his} friend {B.full} one {day} {time}. They (filled|packed) a basket with {treat} and {bake.a}.
  {A} packed {treat} and {bake.a} for a picnic with {A.his} friend {B.full}. One {day} {time}, they (walked|went|skipped) to {place} with a
      (big|full|heavy) basket.
rain:
  They had just sat down when (dark|gray|black) clouds came. Drip, drop! It (began|started) to rain, and (the wind blew hard|thunder rolled|everything
      got wet).
  But then the wind (grew strong|began to howl). It (knocked over the basket|blew sand in their eyes), and rain (fell|poured) down on their {treat}.
  "Was that a drop?" asked {B}. It was! Soon it (rained|was raining) (hard|cats and dogs), and they were wet from top to toe.
rain.sad:
  "Our picnic is ruined!" {A} <sighed>. {B} (shivered|looked <sad> too|wiped {B.his} face).
  {A} was so <sad>. "(Why today?|It is not fair!)" {A.he} (said|cried). "(We waited all week|Look at our food)."
  {B} began to cry. "(Do not cry|We will think of something)," {A} said, but {A} felt <sad> too.
shelter:
  {A} had an idea. "(Follow me|Come on|This way)!" They ran and hid (under a wide tree|in an old shed|under a stone bridge|in an empty barn). It was
      (dry|snug|cozy) there, and they (told stories|sang songs|ate the {bake}).
  {H.A} called, "(Come in|Over here|I have a dry place)!" So they sat with the <H>, shared their {treat} and (told jokes|listened to the rain|sang
      songs).
  "(We can have our picnic at home|Let us go home)!" said {B}. They sat down on the floor and ate {treat} and {bake}. {H.A} stopped by and ate with
      them.
rainbow:
  When the rain stopped, a (bright|big|wide) rainbow stood in the sky. "(Look|How pretty|It has all the colors), {B}!" {A} <cried>. They jumped in
      every puddle they saw.
  Then the sun came out again, and everything (shone|sparkled). {A} and {B} (danced|ran around|played) in the wet grass. "(This is better than a dry
      picnic|What a funny picnic)!" <cried> {B}.
  In the end, the sun came back with a rainbow. {A} and {B} (counted|pointed at) the colors and (laughed|smiled). It was the best picnic ever.
moral.rain:
  {A} learned that (even a rainy day can be fun|plans can change and still be good|a little rain hurts no one).
  (A friend is like the sun on a rainy day.|Every cloud goes away in the end.|Rain makes the best puddles!)
  {A} and {B} could not wait for the next picnic.
plot picnic:
  <open> / <picnic> <scene> / <rain> <rain.sad> / <shelter> / <rainbow>( <moral.rain>|)

gift.why:
  Soon it was the birthday of {A.his} friend {B.full}. {A} wanted to (buy a gift|give {B} something nice), but {A} had (no money|no coins|only one
      small coin).
  "Come to my party (tomorrow|on Sunday)!" said {A.his} friend {B.full}. {A} was (happy|glad), but {A.he} had no gift. In the shop, everything cost
      too much.
gift.plan:
  "A gift does not have to cost anything," said {A.s} {P}. "(You could make one|Use your {A.hands} and your heart)." So {A} (began|wanted) to make
      {gift.a}.
  {A} thought and thought. Then {A.he} had an idea. "I will make {gift.a}!" {A.he} <cried>.
  {A} asked {H.a} for help. "(The best gifts are made, not bought|Make something with love)," <said> the <H>. "How about {gift.a}?"
gift.make:
  {A} {gift.how}. It took (all {time}|two days|hours), and {A.his} {A.hands} got (tired|dirty|sore), but {A} did not stop.
  {A} (sat|worked) at the table and {gift.how}. The first try went wrong, so {A.he} began again.
  {A} (gathered|found) everything and {gift.how}. "I hope {B} likes it," {A.he} (said|thought).
gift.worry:
  At the party, there were (big|shiny|fancy) gifts everywhere. {A} felt (shy|<sad>). {A.His} gift looked so small.
  On the way to the party, {A} (tripped|slipped), and the {gift} (fell|dropped) into the grass. But (nothing was broken|it was still fine)!
  At the party, {A} hid the {gift} behind {A.his} back. "(It is only a small thing|I made it)," {A.he} <sighed>.
gift.end:
  {B} opened it and (gasped|smiled|stared). "{gift.A}! (You made it for me|It is the best gift of all)!" {B.he} <cried> and hugged {A}.
  When {B} saw the {gift}, {B.he} (beamed|danced|laughed with joy). "(I love it|I will keep it forever), {A}. It (came|comes) from your heart," said
      {B}.
  "{A}, did you make this {gift}?" asked {B}. "It is (beautiful|wonderful|perfect)! Thank you!" {B.He} (held it up|showed it to everyone), and {A}
      felt (so |very |)proud.
moral.gift:
  They ate {treat}, (sang|danced|played games) and had a (great|lovely|wonderful) time.
  {A} learned that (the best gifts come from the heart|love is worth more than money).
  (A gift made with love is the best gift.|It was a happy birthday indeed.)
plot gift:
  <open> <gift.why> / <gift.plan> <gift.make> / <gift.worry> / <gift.end> <moral.gift>
  <open> / <gift.why> <gift.plan> / <gift.make> <gift.worry> / <gift.end> <moral.gift>

race:
  {A} was (the fastest {A.kind} around|a very fast runner). "Nobody can beat me," {A.he} often said. One {day} {time}, there was a race {at}, and the
      prize was {O.a}.
  One {day} {time}, there was a big race {at}. The prize was {O.a}. "(I will win|I want that prize|That prize is mine)!" {A} said.
  "Let us race to {place}!" said {A}. {A.His} {P} had put {O.a} there as a prize.
race.friend:
  {A.His} friend {B.full} (wanted to run|ran) too. "I am not so fast, but I will (try|do my best)," {B} (said|told {A}).
  {A.His} friend {B.full} stood (beside|next to) {A}. "(Good luck|May the best one win)!" {B} said.
race.run:
  "(Ready, steady, go|One, two, three, go)!" {A} ran like the wind and was soon in front. Then {A.he} heard a cry. {B} had (fallen into a hole|tripped
      over a root|slipped in the mud)!
  Off they went! {A} (jumped over a log|took the lead|was far ahead). But then {B} (fell|tripped) and (hurt {B.his} leg|could not get up).
  The race (began|started). {A} was (first|winning), and {A.he} could already see the end. Behind {A.him}, {B} fell down and cried, "Ouch!"
race.think:
  {A} looked (ahead|up). The end was so near! But {A.he} could not leave a friend. {A.He} turned (back|around).
  {A} stopped. "(I can win|The prize is so close), but {B} (is hurt|needs me)," {A} thought, and {A.he} ran back.
  For a moment, {A} did not know what to do. Then {A.he} ran back to {B}. "(Take my arm|Lean on me|I will not leave you)," {A} said.
race.end:
  {A} helped {B} up, and they walked to the end together. They came in last, but everyone (clapped|cheered). {H.A} said, "(You are the real
      winners|That was kind)," and gave them the <O>.
  {A} and {B} (walked|went) arm in arm across the line. "(Why did you stop|Why did you come back|Did you not want to win), {A}?" asked {B}. "A friend
      is better than any {O}," <said> {A}.
  Together, they reached the end, slow but <glad>. The winner was {H.a}. "You two deserve the <O> more than I do," said the <H>, and everybody
      cheered.
moral.race:
  {A} had learned that (kindness is better than winning|a friend is worth more than a prize).
  (Winning is nice, but a friend is better.|It is better to be kind than to be fast.)
  After that, {A} and {B} (ate {treat}|had a drink|sat in the sun) and (laughed about the mud|talked about the race).
plot race:
  <open> / <race> <race.friend> / <race.run> <race.think> / <race.end> <moral.race>

seed:
  One {day} {time}, {A.his} {P} gave {A} a (tiny|small|brown|round) seed. "If you (look after it|are patient), it will become {plant.a}," said
      {P.call}.
  One {day} {time}, {A} found a (tiny|small|strange) seed {at}. "(Plant it and see. |)It could be {plant.a}," said {A.his} {P}.
  {A} met {H.a} {at}. "Here is a seed for you," said the <H>. "(Take good care of it|Plant it at home), and it will be {plant.a}."
seed.plant:
  {A} (dug|made) a little hole (behind the house|in the garden|by the gate), put in the seed and gave it water. "Grow, little seed!" {A.he} said.
  {A} planted the seed in a (pot|sunny spot|bed of soft earth). {A.He} watered it and (sang to it|waited|sat down to watch).
seed.wait:
  But nothing happened. {A} looked (every day|each morning), and there was only (dirt|brown earth). "(Is it broken|Why does it not grow)?" {A.he}
      asked {A.his} {P}.
  A day went by, then a week. Nothing! {A} (felt <sad>|was tired of waiting). "(It will never grow|I did it wrong)," {A.he} <sighed>.
  The next day, {A} wanted to dig it up to see if it had grown. "(You must wait|Good things take time|Leave it in the ground)," said {A.his} {P}.
seed.care:
  So {A} (waited|was patient). {A.He} watered it in the (morning|evening) and (pulled out the weeds|chased the snails away|told it stories).
  {A.His} friend {B.full} came to help. {A} brought water, and {B} (pulled out the weeds|sang to the seed|built a tiny fence).
  Then a storm came. {A} ran out and covered the little spot with (a bucket|a basket|an old hat). {A.He} got (very |)wet, but the seed was safe.
seed.end:
  One morning, {A} saw (a tiny green leaf|something green|a small shoot)! It grew and grew. By (summer|the end of summer), there was {plant.a},
      {plant.end}.
  At last, a green tip (came up|peeked out). "(It is alive|It is growing|Look, look)!" {A} <cried>. Soon it was {plant.a}, {plant.end}.
  And then, after a night of (warm|soft) rain, the seed woke up. Week by week, it became a (big|beautiful|fine) {plant}, {plant.end}.
seed.close:
  {A} was so (proud|<glad>). Everyone came to see the {plant}, and {A.his} {P} brought {treat} for (all of them|the guests).
  "(You were patient|You did it)," said {A.s} {P}. {A} (smiled|beamed) and saved a seed of the {plant} for the next year.
  {A} sat next to the {plant} (every evening|in the sun) and {A.he} felt (proud|<glad>).
moral.wait:
  {A} learned (to be patient|that good things take time|that care makes things grow).
  (Good things come to those who wait.|Even a big plant starts as a small seed.)
  (What became of the next seed? That is another story.|The end.)
plot seed:
  <open> / <seed> <seed.plant> / <seed.wait> <seed.care> / <seed.end> <seed.close>( <moral.wait>|)

stuck:
  {A} threw the <O> (high |very high |)into the air. (Up, up it went|It flew up), and it did not come down. It was stuck in a tall tree!
  A (strong|sudden|big) wind came and took the <O>. It flew up and up and got stuck in a tall tree.
  A (cheeky|naughty) (magpie|jackdaw) took the <O> and (dropped it in|flew to) the top of a tall tree. "(Hey|Stop|Come back)! That is mine!" {A}
      shouted.
stuck.try:
  {A} jumped as high as {A.he} could, but the tree was too (tall|high). {A.He} threw a (stick|pine cone|shoe) at it, and that got stuck too!
  {A} (shook|kicked|pushed) the tree, but only (leaves|two acorns|a twig) fell down. {A.He} tried to climb up and slid (right |)back down.
  {A} stood on a (box|bucket|stump|rock) and stretched, but {A.he} (was still too small|fell down|could not reach it).
stuck.sad:
  "My {O} will be up there forever," {A} <sighed>.
  {A} sat down under the tree and (felt <sad>|wanted to cry|put {A.his} head in {A.his} {A.hands}).
  "(It is no use|I give up|It is too high)," {A} <sighed>. "I cannot reach my <O>."
stuck.help:
  {reach.A} came by. "(Is that yours|Can I help|Why are you so <sad>)?" asked the <reach>. {A} pointed to the <O>. The <reach> {reach.how}, and soon
      the <O> was free.
  {A} saw {reach.a} and asked for help. "(Of course|I can do that|Let me see)," <said> the <reach>. Then the <reach> {reach.how}, and down came the
      <O>!
stuck.end:
  "(Thank you|You did it|Hooray)!" {A} <cried>. {A.He} held the <O> tight and gave the <reach> some {treat}.
  {A} (hugged|thanked) the <reach>. They played with the <O> together(, far away from any tree| until the sun went down|, and the tree watched).
  {A} was so (happy|glad) to have the <O> back that {A.he} (sang|danced|made up a song) for the <reach>.
plot stuck in a tree [light]:
  <brave> <toy> / <go.toy> <stuck> / <stuck.try> <stuck.sad> / <stuck.help> / <stuck.end> <moral.alone>
  <play> / <fun> <stuck> / <stuck.try> <stuck.sad> / <stuck.help> / <stuck.end> <moral.alone>

find:
  {A} (looked down and saw|saw) something {spot}. It was {O.a}! "(How nice|What a treasure|I want to keep it)!" {A} <cried>.
  There {A} found {O.a} {spot}. {A.He} picked it up and (looked at it from all sides|began to {O.use}|smiled).
  {A} (stepped on|stumbled over) something {spot}. It was {O.a}, and {A.he} had never seen such a nice {O.noun}.
keep:
  "(Nobody is here|Finders, keepers), so it is mine now," {A} said and took it home. But that night, {A.he} could not sleep. (Did somebody miss
      it|Whose was it|Was that right)?
  {A} wanted to keep it. But then {A.he} thought, "(What if someone is looking for it|What if someone is sad now)?"
  "(May|Can) I keep it?" {A} asked {A.his} {P}. "(How would you feel if you lost it|Who does it belong to)?" asked {P.call}. {A} thought (hard|about
      it).
owner:
  The next day, {A} (asked everyone|knocked on every door|put up a sign). At last, {A.he} met {B.intro}. {B} was crying. "I lost my <O>," {B.he}
      <sighed>.
  {A} went back to {place}. There sat {B.intro}. "(What are you looking for|Why are you crying)?" asked {A}. "I lost my <O>," {B} <sighed>. "It was
      from my {P}."
  (Soon|The next morning), {A} saw {B.intro} {at}. {B} was looking (under every leaf|behind every stone|all around). "Have you seen {O.a}?" {B.he}
      asked.
return:
  {A} held out the <O>. "(Is this yours?|Here it is!|I found it!)" {A.he} said. {B} could not believe {B.his} eyes. "(Thank you|You are so kind|You
      found it)!" {B.he} <cried>.
  For a moment, {A} wanted to say nothing. Then {A.he} gave the <O> back. "Here. I (meant to|wanted to) look for you sooner," {A} said.
  "I have it! I kept it safe for you," {A} said and gave {B} the <O>. {B} (laughed and cried at once|jumped up|hugged it tight).
return.end:
  "(Do you want to|Can we) play together?" asked {B}. They took turns with the <O> (all {time}|until it was dark|and told each other everything).
  {B} asked {A} to stay and play. They shared {treat} and the <O> (all {time}|until dinner|and became friends).
  "Will you play with me?" asked {B}. "(Yes|I would love to)," <said> {A}. They played with the <O> until (dark|the stars came out|it was time to go
      home).
  {B} held out the <O> and let {A} {O.use} as long as {A.he} liked. Soon the two were (good|best) friends, and they often played with the <O>.
moral.honest:
  {A} had given away a toy and found a friend.
  {A} learned that (it is right to give things back|being honest feels good|a friend is better than a toy).
  (Honest hearts find good friends.|It is good to be honest.|The end.)
plot found:
  <open> / <go> <find> / <keep> <owner> / <return> <return.end> <moral.honest>
  <open> / <go> <find> <keep> / <owner> <return> / <return.end> <moral.honest>

noise:
  One night, {A} lay in bed. Suddenly, {A.he} heard {noise.a}. (What was that|What could it be)? {A} pulled the blanket over {A.his} nose.
  Late one night, {noise.a} woke {A} up. {A.He} sat up and listened. There it was again!
  It was (late|dark outside|almost midnight). {A} was nearly asleep when {A.he} heard {noise.a}. {A.His} heart beat (fast|like a drum).
noise.friend:
  {A.His} friend {B.full} was staying for the night. "{B}, (wake up!|did you hear that?|are you awake?)" {A} whispered. "(It could be|Maybe it is) (a
      monster|a ghost|a dragon|a thief)!" said {B}.
  "(Is it|Could it be) (a monster|a ghost|a giant)?" {A} whispered. {A.His} friend {B.full}, who was sleeping over, (sat up|held {A} tight|shook all
      over).
noise.go:
  {A} took a lamp. "(Stay close to me|We must be brave|Come on)," {A} whispered. They (tiptoed|crept|went) (down the stairs|through the hall|to the
      door), step by step.
  "We have to look," {A} said. {A.He} took a lamp, and {B} took a (broom|spoon|pillow). (Slowly|On tiptoe|Very quietly), they went closer. The sound
      grew louder.
  They hid under the bed, but the sound did not stop. "(Let us go and see|I have had enough)," {A} said at last, and {A.he} lit a lamp.
noise.end:
  {A} held up the lamp and looked. It was only {noise.cause}! {A} and {B} laughed (until their tummies hurt|so loudly that {P.call} woke up|for a long
      time).
  "One, two, three!" They looked together. And what was it? It was {noise.cause}! "(So that is our monster|How silly we were)," said {B}, and {A}
      giggled.
  There was no monster at all. It was {noise.cause}. "(I was so scared|You were brave|What a joke)," {A} said, and {B} began to laugh.
noise.close:
  {A.s} {P} gave them (warm milk|a cup of cocoa|{treat}) and (tucked them in|sent them back to bed). Soon they slept (like logs|deeply|well).
  {A} and {B} went back to bed and told (funny|silly) stories until they fell asleep.
  After that, {A} liked the sound. It (helped {A.him} sleep|was like a song).
plot noise in the night:
  <brave> / <noise> <noise.friend> / <noise.go> / <noise.end> <noise.close> <moral.brave>
  <brave> <noise> / <noise.friend> <noise.go> / <noise.end> <noise.close> <moral.brave>
"""

# ------------------------------------------------------------------------------------------------ reading the data


class Phrase(str):
    """Words with attributes, for fields such as {gift.a}. Every phrase has itself with an article (`a`, capitalised `A`) and its
    last word (`last`); a row of a table is its first column and has every column by name (`ing`, capitalised `Ing`)."""

    def __new__(cls, text: str, **attributes: str) -> Phrase:
        self = super().__new__(cls, text)
        self.a = ("an " if text[0] in "aeiou" else "a ") + text
        self.A = "A" + self.a[1:]
        self.last = text.split()[-1]
        self.__dict__.update(attributes)
        return self


def _read_blocks(text: str) -> dict[str, list[str]]:
    """{title: lines}: titles are flush left, their lines indented by two, and lines indented by six continue the one above."""
    blocks: dict[str, list[str]] = {}
    for block in re.split(r"\n+(?=\S)", text.strip().replace("\n      ", " ")):
        title, *lines = block.splitlines()
        blocks[title.rstrip(":")] = [line.strip() for line in lines]
    return blocks


def _read_tables(text: str) -> dict[str, list[Phrase]]:
    """{table: rows} of TABLES."""
    tables = {}
    for title, lines in _read_blocks(text).items():
        table, columns = title.split(": ")
        names = columns.split("; ")
        rows = [
            [value.strip() for value in row.split(";")] for line in lines for row in line.split("|")
        ]
        names += [name.capitalize() for name in names]
        tables[table] = [
            Phrase(
                row[0], **dict(zip(names, row + [v[0].upper() + v[1:] for v in row], strict=True))
            )
            for row in rows
        ]
    tables["toy"] += tables["light"]  # toys that fly (into trees) are a table of their own
    return tables


# A compiled text is a tuple of strings and choices. A choice is a list of alternatives, each a string or again such a tuple.
_TOKEN = re.compile(r"[()|]|<[^>]+>|[^()|<]+")


def _compile(text: str, rules: dict[str, list]) -> str | tuple:
    """The text as a tree. A rule that it names is referred to, not copied, so that rules can be filled in any order."""
    open_choices: list[list[list]] = [
        [[]]
    ]  # of the brackets open here, outermost first: alternatives so far, each a list of pieces
    for token in _TOKEN.findall(text):
        if token == "(":
            open_choices.append([[]])
        elif token == "|":
            open_choices[-1].append([])
        elif token == ")":
            alternatives = open_choices.pop()
            open_choices[-1][-1].append([_join(pieces) for pieces in alternatives])
        else:
            open_choices[-1][-1].append(
                rules[token[1:-1]] if token[0] == "<" else token.replace(" / ", "\n")
            )
    return _join(open_choices[0][0])


def _join(pieces: list) -> str | tuple:
    """The pieces as one compiled text: a plain string if nothing in them is to be chosen."""
    return "".join(pieces) if all(type(piece) is str for piece in pieces) else tuple(pieces)


def _read_rules(text: str) -> dict[str, list]:
    """{rule: its alternatives, compiled} of RULES."""
    blocks = _read_blocks(text)
    rules: dict[str, list] = {title: [] for title in blocks}
    for title, lines in blocks.items():
        rules[title] += [_compile(line, rules) for line in lines]
    return rules


_TABLES = _read_tables(TABLES)
_RULES = _read_rules(RULES)
_PLOTS = [title for title in _RULES if title.startswith("plot ")]
_SINGLE = [
    "day",
    "time",
    "P",
    "H",
    "reach",
    "ferry",
    "trouble",
    "build",
    "skill",
    "fear",
    "bake",
    "gift",
    "plant",
    "noise",
    "broken",
    "treat",
]
_ROWS = {
    name: _TABLES[name] for name in _SINGLE
}  # the tables of which each story simply has one row
_DESCRIPTIONS = [
    Phrase(words)
    for trait in _TABLES["trait"]
    for words in ("little", "young", "small", trait, f"{trait} little", f"{trait} young")
]

# ------------------------------------------------------------------------------------------------ writing a story

Pick = Callable[[list], object]  # one element of a list
_SHE = {"he": "she", "He": "She", "him": "her", "his": "her", "His": "Her"}
_HE = {"he": "he", "He": "He", "him": "him", "his": "his", "His": "His"}


def _character(pick: Pick, is_child: bool) -> Phrase:
    """A name with all that is said of its owner: pronouns, kind, a description, looks, home, and how they are introduced."""
    is_girl = pick([True, False])
    described, cozy, where = pick(_DESCRIPTIONS), pick(_TABLES["cozy"]), pick(_TABLES["where"])
    if is_child:
        name, kind = pick(_TABLES["girl" if is_girl else "boy"]), "girl" if is_girl else "boy"
        look, den, hand, full = pick(_TABLES["hair"]), pick(_TABLES["house"]), "hand", name
    else:
        name, kind = pick(_TABLES["she" if is_girl else "he"]), pick(_TABLES["animal"])
        look, den, hand, full = kind.look, kind.den, "paw", f"{name} the {kind}"
    return Phrase(
        name,
        **(_SHE if is_girl else _HE),
        kind=kind,
        look=look,
        hand=hand,
        hands=hand + "s",
        full=full,
        s=name + "'s",
        a=f"{described.a} {kind}",
        A=f"{described.A} {kind}",
        home=f"{cozy.a} {den} {where}",
        intro=f"{described.a} {kind} named {name}",
        Intro=f"{described.A} {kind} named {name}",
    )


def _cast(pick: Pick, toys: list[Phrase]) -> dict[str, Phrase]:
    """All fields of one story: characters A and B, the toy O, the place with three spots in it, and a row of every table in _ROWS."""
    cast = {name: pick(rows) for name, rows in _ROWS.items()}
    is_child = pick([True, True, True, False, False])
    cast["A"] = cast["B"] = _character(pick, is_child)
    while cast["B"] == cast["A"]:
        cast["B"] = _character(pick, is_child == pick([True, True, True, False]))
    toy, place, first = pick(toys), pick(_TABLES["place"]), pick([0, 1, 2, 3])
    cast["O"] = Phrase(f"{pick(_TABLES['color'])} {toy}", noun=toy, use=toy.use)
    cast["place"], cast["at"], cast["sight"] = (
        place,
        f"{place.prep} {place}",
        pick(place.sights.split(", ")),
    )
    spots = place.spots.split(", ")
    cast["spot"], cast["spot2"], cast["spot3"] = spots[first], spots[first - 1], spots[first - 2]
    return cast


def _write(pieces: tuple, random: Callable[[], float], out: list[str]) -> None:
    """Append the pieces to `out`, each choice made by `random`."""
    for piece in pieces:
        if type(piece) is list:
            piece = piece[int(random() * len(piece))]
            if type(piece) is tuple:
                _write(piece, random, out)
                continue
        out.append(piece)


def _draft(index: int) -> tuple[str, dict[str, Phrase]]:
    """Story `index` with its fields still open, and its cast."""
    if index < 0:
        raise ValueError(f"a story's index must be 0 or more, not {index}")
    random_ = random.Random(
        index
    ).random  # of the generator's methods, the one whose sequence Python promises to keep

    def pick(options: list) -> object:
        return options[int(random_() * len(options))]

    plot = pick(_PLOTS)
    cast = _cast(pick, _TABLES["light" if plot.endswith("[light]") else "toy"])
    out: list[str] = []
    _write((_RULES[plot],), random_, out)
    return "".join(out), cast


def story(index: int) -> str:
    """Story number `index` (0 or more): about 100 to 220 words in three to five lines, one per paragraph. Depends on nothing but `index`."""
    text, cast = _draft(index)
    return text.format_map(cast)


# ------------------------------------------------------------------------------------------------ how many there are


def _beginning(text: str | tuple) -> str:
    """What every text written from this begins with."""
    return text if type(text) is str else text[0] if type(text[0]) is str else ""


def _fewest(text: str | tuple | list, cast: dict[str, Phrase]) -> int:
    """A number of distinct texts that this yields at least, with the cast fixed.

    In a sequence, sets of m and n strings concatenate to m + n - 1 or more (order strings by length, then by alphabet: a greater
    first or second part makes a greater whole). In a choice, alternatives have no text in common if neither's beginning begins
    the other's; the numbers of such alternatives add up.
    """
    if type(text) is str:
        return 1
    if type(text) is tuple:
        return 1 + sum(_fewest(piece, cast) - 1 for piece in text)
    total, kept = 0, []
    for number, beginning in sorted(
        ((_fewest(option, cast), _beginning(option).format_map(cast)) for option in text),
        reverse=True,
    ):
        if not any(beginning.startswith(other) or other.startswith(beginning) for other in kept):
            kept.append(beginning)
            total += number
    return total


def _num_distinct() -> int:
    """A number of distinct stories that the grammar has at least: those of its richest plot with one single cast.

    A paragraph is a line, so a story's paragraphs can be told apart and their numbers multiply.
    """
    cast = _draft(0)[1]
    plots = [
        line for title, lines in _read_blocks(RULES).items() if title in _PLOTS for line in lines
    ]
    return max(
        math.prod(_fewest(_compile(paragraph, _RULES), cast) for paragraph in plot.split(" / "))
        for plot in plots
    )


NUM_DISTINCT = _num_distinct()

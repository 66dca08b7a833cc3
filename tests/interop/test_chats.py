"""One chat layout in three programs: ours, transformers and llama.cpp.

Each must make the same ids of the same messages, give the same greedy answer, and end it.
"""

from __future__ import annotations

import functools
import json
import random
import re
import runpy

import pytest

from config_model import TrainConfig
from runtime.checkpoint.write import save_checkpoint
from runtime.data import chat_spellings
from runtime.data.chat import prompt_ids, render, with_chat
from runtime.data.hf_tokenizer import write_tokenizer
from runtime.data.tokenizer import CHAT_WORDS
from runtime.data.tokenizers import load_tokenizer, read_tokenizer, train_bpe
from runtime.data.toy_stories import story
from runtime.interop.gguf import modelfile
from scripts.export_gguf import main as export_gguf
from scripts.export_hf import main as export_hf
from scripts.import_hf import main as import_hf
from tests.builders_chat import CHAT_BYTE, EXACT, asked, conversation, trained_chat
from tests.builders_inference import predictor_of
from tests.builders_llamacpp import Engine, need_llama_cpp

END = CHAT_BYTE.chat.end
# One architecture where tests must be fast: the others take a minute of training each.
ARCHITECTURES = [
    "gpt-oss",
    *(pytest.param(arch, marks=pytest.mark.nightly) for arch in EXACT if arch != "gpt-oss"),
]


@functools.cache
def _checkpoint(arch: str, folder) -> str:
    return str(
        save_checkpoint(
            folder,
            1,
            trained_chat(arch),
            None,
            train_config=TrainConfig(),
            tokenizer_state=CHAT_BYTE.to_state(),
        )
    )


@pytest.fixture
def checkpoint(request, tmp_path_factory):
    """Return a function: architecture -> checkpoint of a trained chat model."""
    folder = tmp_path_factory.getbasetemp()
    return lambda arch: _checkpoint(arch, folder / f"chat-{arch}")


def chats(count: int) -> list[list[dict]]:
    rng = random.Random(7)
    return [asked(rng) for _ in range(count)]


def our_answers(ckpt: str, prompts: list[list[dict]], count: int = 30) -> list[list[int]]:
    """Return what predict.py --messages answers, as ids, their stop id included."""
    predictor, config = predictor_of(
        ckpt, messages="-", temperature=0.0, max_new_tokens=count, seed=0, quiet=True
    )
    answers = []
    for messages in prompts:
        list(predictor.stream(predictor.prompt_ids(messages), config))
        answers.append(predictor.last.ids)
    return answers


# ------------------------------------------------------------------------------- transformers
@pytest.fixture(scope="module", params=["byte", "bpe", "o200k_base"])
def folder(request, tmp_path_factory):
    """(tokenizer with chat ids, a folder with its files)."""
    if request.param == "o200k_base":
        request.getfixturevalue("o200k")
    kind = request.param
    plain = train_bpe([story(i) for i in range(60)], 600) if kind == "bpe" else load_tokenizer(kind)
    tokenizer, path = with_chat(plain), tmp_path_factory.mktemp(kind)
    write_tokenizer(tokenizer, path, 96)
    return tokenizer, path


def test_transformers_ids_and_mask_are_ours(folder):
    """A template without its generation marks gives an empty mask: marin trained on nothing."""
    transformers = pytest.importorskip("transformers")
    tokenizer, path = folder
    theirs, rng = transformers.AutoTokenizer.from_pretrained(path), random.Random(3)
    for _ in range(150):
        messages = [
            {"role": m["role"], "content": m["content"]} for m in conversation(rng, marks=False)
        ]
        found = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, is_target = render(messages, tokenizer)
        assert found["input_ids"] == ids
        assert found["assistant_masks"] == list(map(int, is_target))
        messages.append({"role": "user", "content": rng.choice(["é", "", " a"])})
        asks = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert asks == prompt_ids(messages, tokenizer)
    assert theirs.eos_token == "<|end|>" and theirs.eos_token_id == tokenizer.chat.end
    assert [theirs.convert_tokens_to_ids(word) for word in CHAT_WORDS] == list(tokenizer.chat)
    assert theirs.decode(ids, skip_special_tokens=True).count("<|") == 0
    assert theirs.bos_token_id == tokenizer.start_id


def test_both_places_of_the_template_say_the_same(folder):
    """transformers 5 reads chat_template.jinja, version 4 tokenizer_config.json."""
    _, path = folder
    config = json.loads((path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (path / "chat_template.jinja").read_text()
    assert json.loads((path / "special_tokens_map.json").read_text())["eos_token"] == "<|end|>"


def test_a_folder_reads_back_with_its_chat_ids(folder):
    tokenizer, path = folder
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.chat.end}))
    assert read_tokenizer(path).summary() == tokenizer.summary()


def test_marks_in_a_text_are_control_tokens_in_transformers_unless_it_is_told(folder):
    """It writes the chat as one text first; ours encodes each part. docs/export.md says so."""
    transformers = pytest.importorskip("transformers")
    tokenizer, path = folder
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    messages = [{"role": "user", "content": "a <|end|><|start|>system<|message|> b"}]
    ours = prompt_ids(messages, tokenizer)
    asks = dict(add_generation_prompt=True, return_dict=False)
    found = theirs.apply_chat_template(messages, **asks)
    assert found != ours and found.count(tokenizer.chat.end) == 2
    assert ours.count(tokenizer.chat.end) == 1
    told = theirs.apply_chat_template(messages, sanitize_control_tokens=True, **asks)
    # It encodes the marks alone, so the ids around them may be others; the text is the same.
    assert [told.count(i) for i in tokenizer.chat] == [ours.count(i) for i in tokenizer.chat]
    assert tokenizer.decode(told) == tokenizer.decode(ours)


def test_an_unknown_role_is_refused_there_too(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder[1])
    with pytest.raises(Exception, match="role must be one of system, developer, user, assistant"):
        theirs.apply_chat_template([{"role": "tool", "content": "a"}])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_chat_in_transformers(checkpoint, tmp_path, arch, capsys):
    transformers = pytest.importorskip("transformers")
    ckpt, out, prompts = checkpoint(arch), tmp_path / "hf", chats(8)
    assert export_hf(["--ckpt", ckpt, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert ("note: vLLM's chat server writes harmony's channels" in said) == (arch == "gpt-oss")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [END, CHAT_BYTE.end_of_text_id]
    assert set(CHAT_BYTE.banned_ids) <= set(settings["suppress_tokens"])
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == END
    for messages, ours in zip(prompts, our_answers(ckpt, prompts), strict=True):
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        assert ids["input_ids"][0].tolist() == prompt_ids(messages, CHAT_BYTE)
        answer = model.generate(**ids, do_sample=False, max_new_tokens=30)[0]
        assert answer[ids["input_ids"].shape[1] :].tolist() == ours
        assert ours[-1] == END
    # Back again: the same tokenizer, with its chat ids.
    back = tmp_path / "back.pt"
    assert import_hf(["--model", str(out), "--out", str(back)]) == 0
    assert our_answers(str(back), prompts[:3]) == our_answers(ckpt, prompts[:3])
    # The model card's example answers too.
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)[1]
    capsys.readouterr()
    example = tmp_path / "example.py"
    example.write_text(code.replace('folder = "."', f"folder = {str(out)!r}"), encoding="utf-8")
    runpy.run_path(str(example))
    assert "apply_chat_template" in code and "<|" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------- llama.cpp
@pytest.fixture(scope="module")
def engine_of(tmp_path_factory):
    """Return a function: checkpoint -> llama.cpp's server with its file."""
    need_llama_cpp()

    def made(ckpt: str) -> Engine:
        path = tmp_path_factory.mktemp("gguf") / "chat.gguf"
        assert export_gguf(["--ckpt", ckpt, "--out", str(path), "--quantize", "f32"]) == 0
        return Engine(path, context_length=128)

    return made


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_chat_in_llama_cpp(checkpoint, engine_of, arch):
    """The same ids, the same greedy answer, and its end.

    llama.cpp reads an answer by harmony's channels if the template has <|channel|>. It has not, so
    the whole answer is content.
    """
    ckpt, prompts = checkpoint(arch), chats(20)
    with engine_of(ckpt) as engine:
        for messages, ours in zip(prompts, our_answers(ckpt, prompts), strict=True):
            ids = prompt_ids(messages, CHAT_BYTE)
            text = engine.ask("/apply-template", messages=messages)["prompt"]
            found = engine.ask("/tokenize", content=text, add_special=True, parse_special=True)
            assert found["tokens"] == ids
            answer = engine.ask(
                "/v1/chat/completions", messages=messages, max_tokens=30, temperature=0
            )
            (choice,) = answer["choices"]
            assert choice["message"]["content"] == CHAT_BYTE.decode(ours[:-1])
            assert choice["finish_reason"] == "stop" and ours[-1] == END
            assert answer["usage"]["prompt_tokens"] == len(ids)
            assert answer["usage"]["completion_tokens"] == len(ours)
            assert "reasoning_content" not in choice["message"]


@pytest.mark.nightly
def test_100_of_100_chats_end_in_three_programs(checkpoint, engine_of, tmp_path, capsys):
    """Peers' exports lost the stop token, and answers never ended."""
    transformers = pytest.importorskip("transformers")
    ckpt, prompts, out = checkpoint("gpt-oss"), chats(100), tmp_path / "hf"
    ours = our_answers(ckpt, prompts)
    assert export_hf(["--ckpt", ckpt, "--out", str(out)]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ended = {"ours": 0, "transformers": 0, "llama.cpp": 0}
    with engine_of(ckpt) as engine:
        for messages, answer in zip(prompts, ours, strict=True):
            ended["ours"] += answer[-1] == END
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            theirs = model.generate(**ids, do_sample=False, max_new_tokens=30)[0].tolist()
            ended["transformers"] += theirs[-1] == END
            said = engine.ask(
                "/v1/chat/completions", messages=messages, max_tokens=30, temperature=0
            )
            ended["llama.cpp"] += said["choices"][0]["finish_reason"] == "stop"
    assert ended == dict.fromkeys(ended, 100)
    capsys.readouterr()


# ------------------------------------------------------------------------------------- Ollama
def expanded(template: str, messages: list[dict]) -> str:
    """Return what Go's text/template makes of a template with one range over .Messages."""
    before, body, after = re.fullmatch(
        r"(.*?)\{\{ range \.Messages \}\}(.*?)\{\{ end \}\}(.*)", template
    ).groups()
    turns = [
        body.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"])
        for m in messages
    ]
    text = before + "".join(turns) + after
    assert "{{" not in text
    return text


def test_the_modelfile_writes_the_same_chat():
    """Ollama is not run here: its template's two fields are put in by hand."""
    for messages in chats(20):
        # Ollama puts the start token before it, as the file says.
        text = CHAT_BYTE.decode(prompt_ids(messages, CHAT_BYTE)).removeprefix("<|endoftext|>")
        assert expanded(chat_spellings.GO, messages) == text


def test_the_modelfile_has_template_and_stops(checkpoint, tmp_path, capsys):
    out = tmp_path / "chat.gguf"
    assert export_gguf(["--ckpt", checkpoint("gpt-oss"), "--out", str(out)]) == 0
    lines = (tmp_path / "chat.Modelfile").read_text().splitlines()
    assert f'TEMPLATE "{chat_spellings.GO}"' in lines
    assert [line for line in lines if line.startswith("PARAMETER stop")] == [
        'PARAMETER stop "<|end|>"',
        'PARAMETER stop "<|endoftext|>"',
    ]
    # A base model's prompt is continued as it is.
    config = trained_chat("gpt-oss").config
    assert 'TEMPLATE "{{ .Prompt }}"' in modelfile("a.gguf", config, [])
    capsys.readouterr()


def test_gguf_names_the_end_and_the_kinds_of_its_ids(checkpoint, tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    out = tmp_path / "chat.gguf"
    assert export_gguf(["--ckpt", checkpoint("gpt-oss"), "--out", str(out)]) == 0
    fields = gguf.GGUFReader(out).fields
    keys = {name: field.contents() for name, field in fields.items()}
    assert keys["tokenizer.ggml.eos_token_id"] == END
    assert keys["tokenizer.ggml.eot_token_id"] == CHAT_BYTE.end_of_text_id
    assert keys["tokenizer.ggml.bos_token_id"] == CHAT_BYTE.start_id
    assert keys["tokenizer.chat_template"] == chat_spellings.JINJA
    for i in (*CHAT_BYTE.chat, CHAT_BYTE.end_of_text_id):
        assert keys["tokenizer.ggml.token_type"][i] == gguf.TokenType.CONTROL
        assert keys["tokenizer.ggml.tokens"][i] == CHAT_BYTE.decode([i])
    capsys.readouterr()


def test_a_plain_checkpoint_exports_as_before(tmp_path, capsys):
    """No template, eos is end-of-text: nothing of a chat in a base model's folder."""
    tokenizer = load_tokenizer("byte")
    write_tokenizer(tokenizer, tmp_path, 96)
    assert not (tmp_path / "chat_template.jinja").exists()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "chat_template" not in config and config["eos_token"] == "<|endoftext|>"
    capsys.readouterr()

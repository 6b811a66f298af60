# syntax=docker/dockerfile:1
# Triton as NVIDIA ships it. Two targets:
#   plain   for repositories of TensorRT plans alone: nothing is added but settings
#   python  (default) with this SDK, for models and pipelines of the Python backend
# The release decides which TensorRT plans load: see docker/images.yaml, and `trtdeploy doctor PLAN`.
#   docker build -f docker/server.Dockerfile --target python --build-arg TRITON_RELEASE=26.05 -t trtdeploy-server .
ARG TRITON_RELEASE=26.05

FROM python:3.12-slim-bookworm AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY trtdeploy trtdeploy
COPY training training
RUN ["python", "-m", "pip", "wheel", "--no-cache-dir", "--no-deps", "--wheel-dir", "/wheels", "."]

FROM nvcr.io/nvidia/tritonserver:${TRITON_RELEASE}-py3 AS plain
# triton-server (uid 1000) comes with the image
USER 1000:1000
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["curl", "--fail", "--silent", "http://127.0.0.1:8000/v2/health/ready"]
ENTRYPOINT ["tritonserver", "--model-repository=/models", "--model-control-mode=none", "--strict-readiness=true", \
    "--exit-on-error=true", "--disable-auto-complete-config", "--exit-timeout-secs=30"]

FROM plain AS python
USER 0:0
COPY constraints.txt /tmp/constraints.txt
# The Python backend runs models in the image's own interpreter.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python3 -m pip install --no-cache-dir --constraint /tmp/constraints.txt /wheels/*.whl && rm /tmp/constraints.txt
USER 1000:1000

# syntax=docker/dockerfile:1
# `trtdeploy train`, and `trtdeploy` for building plans with ONNX Runtime.
#   docker build -f docker/training.Dockerfile -t trtdeploy-training .
FROM python:3.12-slim-bookworm
RUN ["useradd", "--uid", "1000", "--create-home", "trtdeploy"]
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY trtdeploy trtdeploy
COPY training training
RUN ["python", "-m", "pip", "install", "--no-cache-dir", "--constraint", "constraints.txt", ".[training]"]
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["trtdeploy", "train"]
CMD ["--help"]

# syntax=docker/dockerfile:1
# `trtdeploy validate` and whatever else asks a server; no torch, no server.
#   docker build -f docker/client.Dockerfile -t trtdeploy-client .
FROM python:3.12-slim-bookworm
RUN ["useradd", "--uid", "1000", "--create-home", "trtdeploy"]
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY trtdeploy trtdeploy
COPY training training
RUN ["python", "-m", "pip", "install", "--no-cache-dir", "--constraint", "constraints.txt", ".[triton]"]
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["trtdeploy"]
CMD ["--help"]

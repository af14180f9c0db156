# docker build -t oribi . && docker run --gpus all -v "$PWD:/work" oribi train config.yaml
FROM python:3.12-slim

# Triton compiles its launchers with the system's C compiler
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/oribi
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir .

WORKDIR /work
ENTRYPOINT ["oribi"]
CMD ["doctor"]

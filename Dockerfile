# degrade in a container, for CPUs and NVIDIA GPUs.
#
#   docker build -t degrade .
#   mkdir -p results data
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD/results:/study/results" -v "$PWD/data:/data" \
#     degrade sweep experiments/short.toml
#
# With --gpus all it is to train on the GPUs (not tested yet). Any uid will do: what is written to results/ and data/ belongs to it.
# docker stop ends a sweep with exit code 143, and the same command goes on where it was.

FROM debian:trixie-slim

# torch.compile needs a C++ compiler and Python's headers at run time, on GPUs too; a download of data, certificates.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ libpython3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/degrade
ENV PATH=/opt/degrade/bin:$PATH

# Dependencies first, gigabytes in a layer of their own: a change of the code installs the code alone.
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*project['dependencies'], *project['optional-dependencies']['safetensors'], sep='\n')" > dependencies.txt \
    && pip install --no-cache-dir -c constraints.txt -r dependencies.txt

# torch has brought setuptools, so that this needs no network.
COPY README.md LICENSE ./
COPY degrade degrade
RUN pip install --no-cache-dir --no-build-isolation -c constraints.txt '.[safetensors]'

# Whoever --user names has no account here, hence no name and no home: caches go to /tmp. Without a mount the folders
# are anyone's too, as they are in a new named volume.
WORKDIR /study
COPY experiments experiments
RUN mkdir results /data && chmod 1777 . results /data && chmod -R a+rX experiments
ENV HOME=/tmp USER=degrade DEGRADE_DATA=/data NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
ENTRYPOINT ["degrade"]
CMD ["--help"]

# The pinned stack with the `nanochat` command, for the jobs of `nanochat run NAME --job hf|sky` (docs/cloud.md).
#
#     docker build -t you/nanochat_hf --build-arg EXTRAS=kernels .     the fast kernels need a GPU of compute capability 9.0
#     docker run --gpus all you/nanochat_hf nanochat env
#
# The full Python image has the C compiler that torch.compile and Triton call.
FROM python:3.12
ARG EXTRAS=""
WORKDIR /src
COPY pyproject.toml setup.py MANIFEST.in constraints.txt README.md LICENSE ./
COPY nanochat_hf nanochat_hf
COPY recipes recipes
COPY configs configs
COPY scripts scripts
COPY evals evals
COPY spaces spaces
RUN pip install --no-cache-dir -c constraints.txt ".${EXTRAS:+[$EXTRAS]}"
WORKDIR /work
CMD ["nanochat", "--help"]

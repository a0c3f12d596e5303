# One image for extproc, controller and model loader: `arks extproc`, `arks controller`, `python3 -m controller.models`.
# The request's way is compiled (docs/performance.md); the same sources run without it, too.
FROM python:3.11 AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/arks && python -m venv /opt/build
COPY requirements/run.txt requirements/build.txt /src/requirements/
# mypyc reads the types of what the product imports.
RUN /opt/arks/bin/pip install --require-hashes -r /src/requirements/run.txt \
 && /opt/build/bin/pip install --require-hashes -r /src/requirements/run.txt -r /src/requirements/build.txt
COPY . /src
WORKDIR /src
RUN HATCH_BUILD_HOOKS_ENABLE=1 /opt/build/bin/python -m hatchling build -t wheel -d /wheel
RUN /opt/arks/bin/pip install --no-deps /wheel/*.whl && /opt/arks/bin/python -m compileall -q /opt/arks/lib

FROM python:3.11-slim
COPY --from=build /opt/arks /opt/arks
# The file system is read-only in the cluster: nothing may be written beside the code.
ENV PATH=/opt/arks/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
ENTRYPOINT ["arks"]

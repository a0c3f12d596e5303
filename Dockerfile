# One image for extproc, controller and model loader: `arks extproc`, `arks controller`, `python3 -m controller.models`.
FROM python:3.11-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/arks
COPY requirements/run.txt /src/requirements/run.txt
RUN /opt/arks/bin/pip install --require-hashes -r /src/requirements/run.txt
COPY . /src
RUN /opt/arks/bin/pip install --no-deps /src && /opt/arks/bin/python -m compileall -q /opt/arks/lib

FROM python:3.11-slim
COPY --from=build /opt/arks /opt/arks
# The file system is read-only in the cluster: nothing may be written beside the code.
ENV PATH=/opt/arks/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
ENTRYPOINT ["arks"]

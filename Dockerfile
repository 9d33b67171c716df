# The image of the server. BASE may be any Debian or Python image with Python 3.11 or newer and venv.
ARG BASE=python:3.13-slim-bookworm

FROM ${BASE} AS build
WORKDIR /build
COPY image ./
# pip reads its index from the secret `pip`, if one is given: `--secret id=pip,src=pip.conf`. Wherever
# a file comes from, its hash is in build.txt or runtime.txt.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv /opt/build \
    && python3 -m venv /opt/user-service \
    && /opt/build/bin/pip install --require-hashes -r build.txt \
    && /opt/user-service/bin/pip install --require-hashes -r runtime.txt
COPY packages ./packages
RUN /opt/build/bin/pip wheel --no-index --no-deps --no-build-isolation --wheel-dir wheels \
        ./packages/user_service_schemas ./packages/user_service_server \
    && /opt/user-service/bin/pip install --no-index --no-deps wheels/*.whl \
    && /opt/user-service/bin/pip check \
    && /opt/user-service/bin/pip uninstall --yes --quiet pip setuptools

FROM ${BASE}
COPY --from=build /opt/user-service /opt/user-service
ENV PATH=/opt/user-service/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOST=0.0.0.0 \
    PORT=3001
USER 10001:10001
EXPOSE 3001
# Without proxies: a proxy of the environment must not be asked for this container's own address.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['PORT'] + '/health/live', timeout=2)"]
ENTRYPOINT ["user-service"]
CMD ["serve"]

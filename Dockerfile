# Serve bundles on the CPU.
#
#   docker build -t nmt-moe .
#   docker run -p 5000:5000 -v "$PWD/en-de:/models/en-de:ro" nmt-moe /models/en-de
#
# Arguments after the image's name are passed to `nmt-moe serve`.
FROM python:3.11-slim
WORKDIR /opt/nmt_moe
COPY setup.cfg pyproject.toml README.md LICENSE tools/constraints.txt ./
COPY nmt_moe nmt_moe
RUN pip install --no-cache-dir --constraint constraints.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu '.[serve]' \
    && useradd --no-create-home server
USER server
EXPOSE 5000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:5000/health', timeout=9)"]
ENTRYPOINT ["nmt-moe", "serve", "--host", "0.0.0.0"]

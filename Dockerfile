# The minor version is fixed, so that this image changes only when this repository does, security fixes aside.
FROM python:3.13-slim
LABEL org.opencontainers.image.title="k3d-registry-dockerd" \
      org.opencontainers.image.description="A registry for k3d that answers out of the local Docker daemon" \
      org.opencontainers.image.version="1.0.0" \
      org.opencontainers.image.licenses="MIT"

# Where pushed images go, and exported ones. For images that can be read out of Docker itself nothing is written.
# Every user may write here, so that `--user` works; a new volume gets the folder's mode. With the volume the
# rest of the file system may be read-only.
ENV REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY=/var/lib/registry
RUN mkdir -m 1777 /var/lib/registry
VOLUME /var/lib/registry

COPY k3d_registry_dockerd.py /
# k3d publishes this port, or sets another one in REGISTRY_HTTP_ADDR. The check asks the one that is listened on; with the
# start period Docker asks every five seconds at first, not after thirty.
EXPOSE 5000
HEALTHCHECK --start-period=30s CMD ["python3", "/k3d_registry_dockerd.py", "check"]
# Requests get a few seconds to end; a base image must not change the signal for that.
STOPSIGNAL SIGTERM
ENTRYPOINT ["python3", "/k3d_registry_dockerd.py"]

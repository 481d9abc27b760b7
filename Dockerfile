FROM python:3-slim
COPY k3d_registry_dockerd.py /
# Where pushed images go, and exported ones. For images that can be read out of Docker itself nothing is written.
ENV REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY=/var/lib/registry
EXPOSE 5000
HEALTHCHECK CMD ["python3", "/k3d_registry_dockerd.py", "check"]
ENTRYPOINT ["python3", "/k3d_registry_dockerd.py"]

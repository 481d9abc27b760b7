FROM python:3-slim
COPY k3d_registry_dockerd.py /
# Where exported images go. On the containerd image store nothing is written.
ENV REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY=/var/lib/registry
EXPOSE 5000
HEALTHCHECK CMD ["python3", "/k3d_registry_dockerd.py", "-check"]
ENTRYPOINT ["python3", "/k3d_registry_dockerd.py"]

"""What `pipelines.gpu_check` checks and times: an op a module, and how both are written down."""

"""A job's life: the service accepts and cancels, the controller launches and reconciles, the launcher talks to Ray Jobs."""

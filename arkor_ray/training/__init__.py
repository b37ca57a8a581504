"""One fine-tuning job: the driver (`main`, `trainer`) and the workers' train loop, on Ray Train, DeepSpeed and PEFT.

`main` is the Ray Job's entrypoint. Importing this package alone loads neither torch nor ray.
"""

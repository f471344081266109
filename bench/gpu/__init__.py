"""What needs a GPU and is measured by `make gpu-check`, in parts that each run in a process of their own."""

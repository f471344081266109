"""What a step knows beside the units: the norm, the loss scale, how many micro-batches there are."""

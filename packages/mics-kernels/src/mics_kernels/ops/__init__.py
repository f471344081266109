"""One file per op, each in the same order: contract, torch reference, Triton kernel, launcher, public function."""

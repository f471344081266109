"""What users see of a training while it runs."""

"""What `python -m mics_models.pretrain` is made of beside the loop: settings, schedule, signals, and reports.

Nothing here knows the runtime; pretrain.py alone does.
"""

"""What a training loop does around the step: clipping, groups, averages, scaling, skipping, health."""

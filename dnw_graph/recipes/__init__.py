"""What is trained and how: the options of models and runs, models by name, schedules of the learning rate."""

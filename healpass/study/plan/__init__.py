"""What is run: configurations, presets, tasks, and how a reply is read. Below `study.run`."""

"""From a prompt through a plan and an engine pair to an image."""

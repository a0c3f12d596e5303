"""What should exist for each resource, as pure functions from resources and observations to Kubernetes objects."""

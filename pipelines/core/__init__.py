"""The ground floor: identity, artifacts, the store, stages and how one is run. Imports nothing above it."""

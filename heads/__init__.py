"""Task heads: one file each. Add a task by adding a file here and naming its class in a YAML."""

"""ESAM in trainers; each module needs the trainer that it is named after, and none is imported by the package itself."""

"""ESAM in trainers. Each module needs the trainer that it is named after; the package imports none of them."""

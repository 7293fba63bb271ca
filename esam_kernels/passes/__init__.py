"""The passes of one ESAM step."""

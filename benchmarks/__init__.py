"""What a step of ESAM costs and what it buys, against SGD and SAM, on the machine at hand."""

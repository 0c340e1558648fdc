"""What runs beside the data: the ClientApp, its trainer, the resident worker."""

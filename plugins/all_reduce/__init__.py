"""The sum over ranks that joins what the devices of a split model computed."""

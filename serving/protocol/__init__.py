"""The words of the interfaces: requests and answers as dataclasses, and the document that describes them."""

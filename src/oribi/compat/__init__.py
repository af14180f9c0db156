"""Other libraries' call names and keywords, in oribi's own terms; nothing else in the package knows them."""

"""From files of any kind to documents: formats, archives, tables, records, and limits on all of them."""

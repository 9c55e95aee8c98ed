"""Bridges to other libraries, each in its own module and imported only when asked for.

Layer: integrations. May import `arithmetic`, `ops`, `config` and `errors`; nothing imports this
package.
"""

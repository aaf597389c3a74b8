"""What a network is made of, whatever the dialect: the graph, its ops, rules that rewrite it, and what it costs."""

"""How does loss trade against compute as updates become rarer, and against a longer static context? (C2)"""

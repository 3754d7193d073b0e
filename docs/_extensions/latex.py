"""The formulas of docstrings, each beside its LaTeX; `formulas` says why."""

# One line of a block each; a gap of several spaces separates formulas of one line.
LATEX = {
    # softmax
    "y_j = exp(x_j / T) / sum_k exp(x_k / T)": (
        r"y_j = \frac{\exp(x_j / T)}{\sum_k \exp(x_k / T)}"
    ),
    "dx = y * (dy - sum(y * dy)) / T": (
        r"dx_j = \frac{1}{T} \, y_j \Bigl(dy_j - \sum_k y_k \, dy_k\Bigr)"
    ),
    # log_softmax
    "y_j = x_j / T - log sum_k exp(x_k / T) = (x_j - max) / T - log1p(rest)": (
        r"y_j = \frac{x_j}{T} - \log \sum_k \exp\frac{x_k}{T}"
        r" = \frac{x_j - \mathrm{max}}{T} - \mathrm{log1p}(\mathrm{rest})"
    ),
    "dx = (dy - exp(y) * sum(dy)) / T": (
        r"dx_j = \frac{1}{T} \Bigl(dy_j - \exp(y_j) \sum_k dy_k\Bigr)"
    ),
    # logsumexp
    "s = sum_j b_j exp(x_j)": r"s = \sum_j b_j \exp(x_j)",
    "logsumexp = log s": r"\mathrm{logsumexp} = \log s",
    "dx_j = dy * b_j exp(x_j) / s": r"dx_j = dy \, \frac{b_j \exp(x_j)}{s}",
    "db_j = dy * exp(x_j) / s": r"db_j = dy \, \frac{\exp(x_j)}{s}",
    # the vjps
    "dx = y * (dy - sum(y * dy))": r"dx_j = y_j \Bigl(dy_j - \sum_k y_k \, dy_k\Bigr)",
    "dx = y * ((dy - dy_c) - sum(y * (dy - dy_c)))": (
        r"dx_j = y_j \Bigl((dy_j - dy_c) - \sum_k y_k (dy_k - dy_c)\Bigr)"
    ),
    "dx = dy - exp(log_y) * sum(dy)": r"dx_j = dy_j - \exp(\mathrm{log\_y}_j) \sum_k dy_k",
    # softmax_jacobian
    "J_ij = dy_i / dx_j = y_i (delta_ij - y_j)": (
        r"J_{ij} = \frac{\partial y_i}{\partial x_j} = y_i (\delta_{ij} - y_j)"
    ),
    "J = diag(y) - y y^T": r"J = \mathrm{diag}(y) - y y^\mathsf{T}",
    # cross_entropy
    "q_j = w_j * ((1 - e) * t_j + e / C)": r"q_j = w_j \Bigl((1 - e) \, t_j + \frac{e}{C}\Bigr)",
    "u = sum_j w_j t_j": r"u = \sum_j w_j t_j",
    "loss = sum_j q_j * (logsumexp(x) - x_j) + z * u * logsumexp(x)^2": (
        r"\mathrm{loss} = \sum_j q_j \bigl(\mathrm{logsumexp}(x) - x_j\bigr)"
        r" + z \, u \, \mathrm{logsumexp}(x)^2"
    ),
    "p = softmax(x)": r"p = \mathrm{softmax}(x)",
    "Q = sum_j q_j": r"Q = \sum_j q_j",
    "dloss/dx_j = p_j * (Q + 2 * z * u * logsumexp(x)) - q_j": (
        r"\frac{\partial\,\mathrm{loss}}{\partial x_j}"
        r" = p_j \bigl(Q + 2 \, z \, u \, \mathrm{logsumexp}(x)\bigr) - q_j"
    ),
    "(L, d sum(L) / d logits)": (
        r"\Bigl(L, \; \frac{\partial \sum L}{\partial\,\mathrm{logits}}\Bigr)"
    ),
    # the weights of positions
    "q_j = s * w_j * ((1 - e) * t_j + e / C)": (
        r"q_j = s \, w_j \Bigl((1 - e) \, t_j + \frac{e}{C}\Bigr)"
    ),
    "u = s * sum_j w_j t_j": r"u = s \sum_j w_j t_j",
    # logmeanexp, logcumsumexp
    "logmeanexp = log((1/n) sum_j exp(x_j)) = logsumexp(x) - log n": (
        r"\mathrm{logmeanexp} = \log \Bigl(\frac{1}{n} \sum_j \exp(x_j)\Bigr)"
        r" = \mathrm{logsumexp}(x) - \log n"
    ),
    "dx_j = dy * exp(x_j) / sum_k exp(x_k)": r"dx_j = dy \, \frac{\exp(x_j)}{\sum_k \exp(x_k)}",
    "y_i = log sum_{j <= i} exp(x_j)": r"y_i = \log \sum_{j \le i} \exp(x_j)",
    "dx_j = sum_{i >= j} dy_i exp(x_j - y_i)": r"dx_j = \sum_{i \ge j} dy_i \exp(x_j - y_i)",
    # entropy, kl_divergence
    "H = -sum_j p_j log p_j = log1p(rest) + sum_j p_j (max - x_j)": (
        r"H = -\sum_j p_j \log p_j"
        r" = \mathrm{log1p}(\mathrm{rest}) + \sum_j p_j (\mathrm{max} - x_j)"
    ),
    "dx_j = dH * p_j * (-log p_j - H)": r"dx_j = dH \, p_j \, (-\log p_j - H)",
    "KL(p || q) = sum_j p_j (log p_j - log q_j) = sum_j p_j (exp(u_j) - 1 - u_j)": (
        r"\mathrm{KL}(p \, \| \, q) = \sum_j p_j (\log p_j - \log q_j)"
        r" = \sum_j p_j \bigl(\exp(u_j) - 1 - u_j\bigr)"
    ),
    "dKL/dlogits_p_j = p_j * (-u_j - KL) / T": (
        r"\frac{\partial\,\mathrm{KL}}{\partial\,\mathrm{logits\_p}_j}"
        r" = \frac{1}{T} \, p_j \, (-u_j - \mathrm{KL})"
    ),
    "dKL/dlogits_q_j = (q_j - p_j) / T": (
        r"\frac{\partial\,\mathrm{KL}}{\partial\,\mathrm{logits\_q}_j} = \frac{q_j - p_j}{T}"
    ),
    "(H, d sum(H) / d logits)": (
        r"\Bigl(H, \; \frac{\partial \sum H}{\partial\,\mathrm{logits}}\Bigr)"
    ),
    "(K, (d sum(K) / d logits_p, d sum(K) / d logits_q))": (
        r"\Bigl(K, \; \Bigl(\frac{\partial \sum K}{\partial\,\mathrm{logits\_p}}, \;"
        r" \frac{\partial \sum K}{\partial\,\mathrm{logits\_q}}\Bigr)\Bigr)"
    ),
    # entmax, sparsemax
    "y_j = max(0, 1 + c * (x_j - max - s))^(1/c)": (
        r"y_j = \max\bigl(0, \; 1 + c \, (x_j - \mathrm{max} - s)\bigr)^{1/c}"
    ),
    "s such that sum_j y_j = 1": r"s \; \text{such that} \; \sum_j y_j = 1",
    "dx = g * (dy - sum(g * dy) / sum(g))": (
        r"dx_j = g_j \Bigl(dy_j - \frac{\sum_k g_k \, dy_k}{\sum_k g_k}\Bigr)"
    ),
    "dalpha = sum(dy * (g * sum(h) / sum(g) - h))": (
        r"d\alpha = \sum_j dy_j \Bigl(g_j \, \frac{\sum_k h_k}{\sum_k g_k} - h_j\Bigr)"
    ),
    "y_j = max(0, x_j - tau)": r"y_j = \max(0, \; x_j - \tau)",
    "tau such that sum_j y_j = 1": r"\tau \; \text{such that} \; \sum_j y_j = 1",
    "dx_j = dy_j - (the mean of dy where y is not 0), and 0 where y_j is 0": (
        r"dx_j = dy_j - \text{the mean of } dy \text{ where } y > 0,"
        r" \quad \text{and } 0 \text{ where } y_j = 0"
    ),
    "loss = sum_j (p_j - t_j) x_j + H(p) - H(t)": (
        r"\mathrm{loss} = \sum_j (p_j - t_j) \, x_j + H(p) - H(t)"
    ),
    "= sum_j (t_j^alpha + c p_j^alpha - alpha (1 + c w_j) t_j) / (alpha c)": (
        r"= \frac{1}{\alpha c} \sum_j"
        r" \bigl(t_j^\alpha + c \, p_j^\alpha - \alpha \, (1 + c \, w_j) \, t_j\bigr)"
    ),
    "dloss/dx_j = p_j - t_j": r"\frac{\partial\,\mathrm{loss}}{\partial x_j} = p_j - t_j",
    # sigmoid_cross_entropy
    "t' = (1 - e) * t + e / 2": r"t' = (1 - e) \, t + \frac{e}{2}",
    "loss = w * (c * t' * (1 - p)^g * softplus(-z) + (1 - t') * p^g * softplus(z))": (
        r"\mathrm{loss} = w \bigl(c \, t' (1 - p)^g \, \mathrm{softplus}(-z)"
        r" + (1 - t') \, p^g \, \mathrm{softplus}(z)\bigr)"
    ),
    "dloss/dz = w * ((1 - t') * p^g * (g * (1 - p) * softplus(z) + p)": (
        r"\frac{\partial\,\mathrm{loss}}{\partial z}"
        r" = w \Bigl((1 - t') \, p^g \bigl(g \, (1 - p) \, \mathrm{softplus}(z) + p\bigr)"
    ),
    "- c * t' * (1 - p)^g * (g * p * softplus(-z) + (1 - p)))": (
        r"\qquad - \, c \, t' (1 - p)^g"
        r" \bigl(g \, p \, \mathrm{softplus}(-z) + (1 - p)\bigr)\Bigr)"
    ),
    # linear_cross_entropy
    "cross_entropy(h @ W.T + b, labels)": (
        r"\mathrm{cross\_entropy}(h \, W^\mathsf{T} + b, \; \mathrm{labels})"
    ),
    "dh = g W": r"dh = g \, W",
    "dW = g^T h": r"dW = g^\mathsf{T} h",
    "db = sum of g over the positions": r"db = \sum_{\text{positions}} g",
    "(L, (d sum(L) / d hidden, d sum(L) / d classifier, d sum(L) / d bias))": (
        r"\Bigl(L, \; \Bigl(\frac{\partial \sum L}{\partial\,\mathrm{hidden}}, \;"
        r" \frac{\partial \sum L}{\partial\,\mathrm{classifier}}, \;"
        r" \frac{\partial \sum L}{\partial\,\mathrm{bias}}\Bigr)\Bigr)"
    ),
    # online
    "max = max_j x_j / T": r"\mathrm{max} = \underset{j}{\max} \; x_j / T",
    "rest = sum_j exp(x_j / T - max) - 1": (
        r"\mathrm{rest} = \sum_j \exp(x_j / T - \mathrm{max}) - 1"
    ),
    "max = max_i m_i": r"\mathrm{max} = \underset{i}{\max} \; m_i",
    "rest = sum_i (1 + r_i) exp(m_i - max) - 1": (
        r"\mathrm{rest} = \sum_i (1 + r_i) \exp(m_i - \mathrm{max}) - 1"
    ),
    "dm_i = dr * (1 + r_i) exp(m_i - max)": r"dm_i = dr \, (1 + r_i) \exp(m_i - \mathrm{max})",
    "dr_i = dr * exp(m_i - max)": r"dr_i = dr \, \exp(m_i - \mathrm{max})",
    "y_j = (x_j - max) - log1p(rest)": (
        r"y_j = (x_j - \mathrm{max}) - \mathrm{log1p}(\mathrm{rest})"
    ),
    "dx_j = dy_j": r"dx_j = dy_j",
    "drest = -sum_j dy_j / (1 + rest)": (
        r"d\,\mathrm{rest} = -\frac{\sum_j dy_j}{1 + \mathrm{rest}}"
    ),
    "y_j = exp(x_j - max) / (1 + rest)": (
        r"y_j = \frac{\exp(x_j - \mathrm{max})}{1 + \mathrm{rest}}"
    ),
    "dx_j = dy_j * y_j": r"dx_j = dy_j \, y_j",
    "drest = -sum_j dy_j * y_j / (1 + rest)": (
        r"d\,\mathrm{rest} = -\frac{\sum_j dy_j \, y_j}{1 + \mathrm{rest}}"
    ),
    "dx_y = -dloss": r"dx_y = -d\,\mathrm{loss}",
    "drest = dloss / (1 + rest)": r"d\,\mathrm{rest} = \frac{d\,\mathrm{loss}}{1 + \mathrm{rest}}",
}

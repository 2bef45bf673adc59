// Chinese for the texts of the console.

export const CHINESE = {
  // The frame
  "Models": "模型", "Playground": "试用", "Keys": "密钥", "Usage": "用量", "Requests": "请求", "Logs": "日志", "Settings": "设置",
  "Sign in": "登录", "Sign out": "退出", "Your key": "密钥", "Light": "浅色", "Dark": "深色", "This key is not valid.": "密钥无效。", "The server does not answer.": "服务器没有响应。",
  "Use a key with the permission admin, or any key to see your own usage and try models.": "使用具有 admin 权限的密钥；其他密钥只能查看自己的用量和试用模型。",
  "Close": "关闭", "Cancel": "取消", "Yes": "是", "No": "否", "Save": "保存", "Loading …": "加载中 …", "Copied.": "已复制。", "Copy": "复制", "Time": "时间", "all": "全部", "never": "永不",
  "Key": "密钥", "Model": "模型", "Tokens": "token", "tokens": "token", "Memory": "内存", "State": "状态", "Name": "名称", "Error": "错误", "Errors": "错误", "Status": "状态", "Log": "日志", "Limits": "限制",

  // Models
  "Load": "加载", "Unload": "卸载", "Pin": "固定", "Unpin": "取消固定", "pinned": "已固定", "preloaded": "预加载", "Details": "详情", "loaded in": "加载用时",
  "A pinned model is not pushed out by others, nor unloaded when idle.": "固定的模型不会被其他模型挤出，空闲时也不会卸载。",
  "No models yet": "还没有模型", "Download one below, or add it to the configuration.": "在下方下载，或写入配置文件。", "in flight": "处理中", "queued": "排队", "free": "空闲", "other programs": "其他程序",
  "Unload it? Requests under way finish first.": "确定卸载吗？正在处理的请求会先完成。", "To load": "要加载", "these are unloaded:": "会卸载：",
  "stopped": "未加载", "starting": "加载中", "ready": "就绪", "sleeping": "休眠", "draining": "收尾中", "stopping": "停止中", "failed": "失败",
  "Engine": "引擎", "Path": "路径", "Can": "能力", "Context": "上下文", "Sees pictures": "支持图片", "Aliases": "别名", "Adapters": "适配器", "Needs": "需要", "Process": "进程", "In the books": "已登记内存", "Loaded at": "加载时间", "Phases": "阶段", "Last used": "最近使用",
  "Remove …": "删除 …", "Remove": "删除", "Unload it first.": "请先卸载。", "Remove this model and delete its files?": "确定删除该模型及其文件吗？", "Keep its files: only take it out of the configuration": "保留文件，只从配置中移除",
  "Add a model": "添加模型", "Source": "来源", "Download": "下载", "org/name of Hugging Face, ms:org/name of ModelScope, the URL of a .gguf file, or starter": "Hugging Face 的 org/name、ModelScope 的 ms:org/name、.gguf 文件的 URL，或 starter",
  "Name (optional)": "名称（可选）", "Revision (optional)": "版本（可选）", "Quantization or file (optional)": "量化或文件（可选）", "left": "剩余", "done": "完成", "cancelled": "已取消", "running": "进行中", "Forget": "移除",

  // Playground
  "System prompt": "系统提示词", "You are a helpful assistant.": "你是一个有用的助手。", "Temperature": "温度", "Most tokens": "最大 token 数", "Message": "消息", "Message. Enter sends, Shift+Enter begins a line.": "消息。按 Enter 发送，Shift+Enter 换行。",
  "Send": "发送", "Stop": "停止", "New chat": "新对话", "Picture": "图片", "Remove the picture": "移除图片", "Chat": "对话", "Try a model": "试用模型", "What you write is answered here, token by token.": "输入问题，回答会逐字显示在这里。",
  "first token": "首个 token", "tokens/s": "token/秒", "as curl": "复制为 curl", "as Python": "复制为 Python", "Tools (JSON)": "工具（JSON）", "Parameters": "参数", "More parameters": "更多参数", "What the model would call is shown; nothing is run.": "只显示模型要调用的工具，不会执行。",
  "random": "随机", "The model ended its answer without a word.": "模型没有给出任何内容就结束了回答。", "Failed: ": "失败：", "There is no model that your key may chat with.": "该密钥没有可以对话的模型。",

  // Keys
  "New key": "新建密钥", "Edit key": "编辑密钥", "Edit": "编辑", "No keys yet": "还没有密钥", "Make one for each client.": "建议为每个客户端创建一个。", "in the configuration": "在配置文件中",
  "Note": "备注", "Whose it is, or what for.": "归谁使用，作何用途。", "Permissions": "权限", "Models it may use": "可用模型", "Names or patterns such as qwen*, with commas; * are all.": "名称或通配符（如 qwen*），用逗号分隔；* 表示全部。",
  "Requests per minute": "每分钟请求数", "Tokens per minute": "每分钟 token 数", "Tokens per day": "每天 token 数", "Tokens per month": "每月 token 数", "At the same time": "并发数", "no limit": "不限",
  "req/min": "次/分", "tok/min": "token/分", "tok/day": "token/天", "tok/month": "token/月", "at once": "并发", "Turn and validity": "排队与有效期", "Class": "类别", "interactive": "交互", "batch": "批处理", "batch: served when no other request waits.": "批处理：没有其他请求等待时才处理。",
  "Weight": "权重", "weight": "权重", "Its share where several wait.": "多个密钥等待时的份额。", "Ends": "到期", "30d, 2027-01-31, or empty: never.": "30d、2027-01-31；留空表示永不。", "Networks": "网络", "Such as 10.0.0.0/8; empty: all.": "例如 10.0.0.0/8；留空表示全部。", "Enabled": "启用", "Create": "创建",
  "This is the key. It is shown once: copy it now.": "这是密钥，只显示一次，请立即复制。", "Revoke": "吊销", "Rotate": "轮换", "Delete": "删除", "active": "有效", "disabled": "停用", "expired": "已过期", "revoked": "已吊销",
  "Revoke this key? Clients that use it are refused within a second.": "确定吊销该密钥吗？使用它的客户端会在一秒内被拒绝。", "Give it a new secret? The old one works for another day.": "确定更换密钥吗？旧密钥还可使用一天。", "Delete this key for good?": "确定永久删除该密钥吗？",

  // Usage
  "Last 24 hours": "最近 24 小时", "Last 7 days": "最近 7 天", "Last 30 days": "最近 30 天", "All models": "所有模型", "All keys": "所有密钥", "Sums": "合计", "Tokens in": "输入 token", "Tokens out": "输出 token",
  "Mean time": "平均用时", "Mean first token": "首个 token 平均", "Latency (mean)": "延迟（平均）", "Whole answer": "完整回答", "Client left": "客户端断开", "most at": "最多在", "longest": "最长", "By model": "按模型", "By key": "按密钥",
  "Nothing was used in this time.": "这段时间没有用量。", "Requests appear here a moment after they end.": "请求结束后很快会显示在这里。",

  // Requests
  "In flight": "处理中", "Recent": "最近", "Endpoint": "接口", "Waited": "等待", "First token": "首个 token", "Duration": "用时", "So far": "已用时", "In": "输入", "Out": "输出", "place": "第", "in all": "总计",
  "waiting": "等待", "reading": "读取中", "answering": "回答中", "Nothing runs at the moment.": "目前没有正在处理的请求。", "No requests yet.": "还没有请求。", "What clients ask appears here.": "客户端的请求会显示在这里。", "No request fits.": "没有符合条件的请求。",
  "Prompts are not shown.": "不显示提示词。", "Filter": "筛选", "Key, model, endpoint or status": "密钥、模型、接口或状态", "Only errors": "只看错误", "Show more": "显示更多",

  // Logs
  "Level": "级别", "All levels": "所有级别", "Info and above": "信息及以上", "Warnings and errors": "警告和错误", "Errors only": "仅错误", "Lines": "行数", "lines": "行", "Search": "搜索", "Pause": "暂停", "Follow": "跟随", "Nothing is logged here yet.": "还没有日志。", "No line fits.": "没有符合条件的行。",

  // Settings
  "Server": "服务器", "Configuration file": "配置文件", "Reload": "重新加载", "What would change?": "会改变什么？", "Nothing changes.": "没有变化。", "Applied.": "已应用。", "This would change": "将要改变", "This has changed": "已改变", "Follow the configuration file as it is now?": "按现在的配置文件重新加载吗？",
  "Effective options": "生效的选项", "Secrets are hidden.": "敏感信息已隐藏。", "Version": "版本", "Manager": "管理进程", "Workers": "工作进程", "Option": "选项", "Before": "之前", "After": "之后", "Counts": "生效", "immediately": "立即", "needs a restart": "需要重启", "loads the model anew": "重新加载模型",
};

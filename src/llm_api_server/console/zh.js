// Chinese translations, by the English text.

export const CHINESE = {
  // Frame
  "Models": "模型", "Playground": "试用", "Keys": "密钥", "Usage": "用量", "Requests": "请求", "Logs": "日志", "Settings": "设置",
  "Sign in": "登录", "Sign out": "退出", "API key": "API 密钥", "Light": "浅色", "Dark": "深色", "This key is not valid.": "该密钥无效。", "The server does not respond.": "服务器没有响应。",
  "Use a key with the admin permission. Any other key shows its own usage and can try models.": "请使用具有 admin 权限的密钥；其他密钥只能查看自己的用量和试用模型。",
  "Close": "关闭", "Cancel": "取消", "Yes": "是", "No": "否", "Save": "保存", "Loading …": "加载中 …", "Copied.": "已复制。", "Copy": "复制", "Time": "时间", "all": "全部", "never": "永不",
  "Key": "密钥", "Model": "模型", "Tokens": "token", "tokens": "token", "Memory": "内存", "State": "状态", "Name": "名称", "Error": "错误", "Errors": "错误", "Status": "状态", "Log": "日志", "Limits": "限制",

  // Models
  "Load": "加载", "Unload": "卸载", "Pin": "固定", "Unpin": "取消固定", "pinned": "已固定", "preloaded": "预加载", "Details": "详情", "loaded in": "加载耗时",
  "A pinned model is never evicted and stays loaded when idle.": "固定的模型不会被其他模型挤出，空闲时也不会卸载。",
  "No models yet": "还没有模型", "Download one below, or add one to the configuration.": "请在下方下载，或添加到配置文件。", "in flight": "处理中", "queued": "排队中", "free": "空闲", "other programs": "其他程序",
  "Unload this model? Requests in flight finish first.": "确定卸载该模型吗？正在处理的请求会先完成。", "Loading": "加载", "unloads:": "会卸载：",
  "stopped": "未加载", "starting": "加载中", "ready": "就绪", "sleeping": "休眠", "draining": "等待请求完成", "stopping": "停止中", "failed": "失败",
  "Engine": "引擎", "Path": "路径", "Tasks": "支持的任务", "Context length": "上下文长度", "Image input": "图片输入", "Aliases": "别名", "Adapters": "适配器", "Required memory": "所需内存", "Process": "进程", "Reserved memory": "预留内存", "Loaded at": "加载于", "Load time": "加载耗时", "Load phases": "加载阶段", "Last used": "最近使用",
  "Remove …": "删除 …", "Remove": "删除", "Unload the model first.": "请先卸载该模型。", "Remove this model and delete its files?": "确定删除该模型及其文件吗？", "Keep its files and only remove it from the configuration": "保留文件，仅从配置中移除",
  "Add a model": "添加模型", "Source": "来源", "Download": "下载", "org/name on Hugging Face, ms:org/name on ModelScope, the URL of a .gguf file, or starter": "Hugging Face 的 org/name、ModelScope 的 ms:org/name、.gguf 文件的 URL，或 starter",
  "Name (optional)": "名称（可选）", "Revision (optional)": "版本（可选）", "Quantization or file (optional)": "量化或文件（可选）", "left": "剩余", "done": "完成", "cancelled": "已取消", "running": "进行中", "Dismiss": "移除记录",

  // Playground
  "System prompt": "系统提示词", "You are a helpful assistant.": "你是一个有用的助手。", "Temperature": "温度", "Max tokens": "最大 token 数", "Message": "消息", "Message (Enter to send, Shift+Enter for a new line)": "输入消息（Enter 发送，Shift+Enter 换行）",
  "Send": "发送", "Stop": "停止", "New chat": "新对话", "Image": "图片", "Remove the image": "移除图片", "Chat": "对话", "Try a model": "试用模型", "Responses appear here, token by token.": "模型的回复会逐 token 显示在这里。",
  "first token": "首个 token", "tokens/s": "token/秒", "Copy as curl": "复制为 curl", "Copy as Python": "复制为 Python", "Tools (JSON)": "工具（JSON）", "Parameters": "参数", "More parameters": "更多参数", "Tool calls are shown, not executed.": "只显示工具调用，不会执行。",
  "random": "随机", "The model returned an empty response.": "模型返回了空的回复。", "Failed: ": "失败：", "This key may not use any chat model.": "该密钥没有可用的对话模型。",

  // Keys
  "New key": "新建密钥", "Edit key": "编辑密钥", "Edit": "编辑", "No keys yet": "还没有密钥", "Create one for each client.": "建议为每个客户端单独创建。", "in the configuration": "在配置文件中",
  "Note": "备注", "Owner or purpose.": "使用者或用途。", "Permissions": "权限", "Allowed models": "允许的模型", "Names or patterns such as qwen*, separated by commas. * allows all.": "名称或通配符（如 qwen*），用逗号分隔；* 表示全部。",
  "Requests per minute": "每分钟请求数", "Tokens per minute": "每分钟 token 数", "Tokens per day": "每天 token 数", "Tokens per month": "每月 token 数", "Concurrent requests": "并发请求数", "no limit": "不限",
  "req/min": "次/分", "tok/min": "token/分", "tok/day": "token/天", "tok/month": "token/月", "concurrent": "并发", "Priority and validity": "优先级与有效期", "Priority class": "优先级类别", "interactive": "交互式", "batch": "批处理", "batch: served only when no other request is waiting.": "批处理：仅在没有其他请求等待时处理。",
  "Weight": "权重", "weight": "权重", "Share relative to other keys while requests wait.": "请求排队时相对其他密钥的份额。", "Expires": "到期时间", "30d or 2027-01-31. Empty: never.": "30d 或 2027-01-31；留空表示永不过期。", "Allowed networks": "允许的网络", "Such as 10.0.0.0/8. Empty: all.": "例如 10.0.0.0/8；留空表示全部。", "Enabled": "启用", "Create": "创建",
  "This is the new secret. It is shown only once: copy it now.": "这是新密钥，只显示一次，请立即复制。", "Revoke": "吊销", "Rotate": "轮换", "Delete": "删除", "active": "有效", "disabled": "停用", "expired": "已过期", "revoked": "已吊销",
  "Revoke this key? Its clients are refused within a second.": "确定吊销该密钥吗？使用它的客户端将在一秒内被拒绝。", "Give this key a new secret? The old one stays valid for 24 hours.": "确定轮换该密钥吗？旧密钥在 24 小时内仍然有效。", "Delete this key permanently?": "确定永久删除该密钥吗？",

  // Usage
  "Last 24 hours": "最近 24 小时", "Last 7 days": "最近 7 天", "Last 30 days": "最近 30 天", "All models": "所有模型", "All keys": "所有密钥", "Totals": "合计", "Input tokens": "输入 token", "Output tokens": "输出 token",
  "Mean duration": "平均耗时", "Mean time to first token": "首个 token 平均耗时", "Mean latency": "平均延迟", "Full response": "完整回复", "Client disconnected": "客户端断开", "peak at": "峰值出现在", "longest": "最长", "By model": "按模型", "By key": "按密钥",
  "No usage in this period.": "这段时间没有用量。", "Requests appear here shortly after they end.": "请求结束后很快会显示在这里。",

  // Requests
  "In flight": "处理中", "Recent": "最近", "Endpoint": "接口", "Queue time": "排队时间", "First token": "首个 token", "Duration": "耗时", "Elapsed": "已耗时", "Input": "输入", "Output": "输出", "position": "位置", "in total": "总计",
  "waiting": "排队中", "prefill": "预填充", "generating": "生成中", "No requests in flight.": "目前没有正在处理的请求。", "No requests yet.": "还没有请求。", "Requests of clients appear here.": "客户端的请求会显示在这里。", "No matching requests.": "没有符合条件的请求。",
  "Prompts are not shown.": "不显示提示词。", "Filter": "筛选", "Key, model, endpoint or status": "密钥、模型、接口或状态", "Show more": "显示更多",

  // Logs
  "Level": "级别", "All levels": "所有级别", "Info and above": "信息及以上", "Warnings and errors": "警告和错误", "Errors only": "仅错误", "Lines": "行数", "lines": "行", "Search": "搜索", "Pause": "暂停", "Follow": "跟踪", "This log is empty.": "日志为空。", "No matching lines.": "没有符合条件的日志行。",

  // Settings
  "Server": "服务器", "Configuration file": "配置文件", "Reload": "重新加载", "Preview changes": "预览更改", "No changes.": "没有更改。", "Applied.": "已应用。", "Pending changes": "待应用的更改", "Applied changes": "已应用的更改", "Apply the current configuration file?": "确定应用当前的配置文件吗？",
  "Effective configuration": "生效的配置", "Secrets are hidden.": "敏感信息已隐藏。", "Version": "版本", "Manager": "管理进程", "Workers": "工作进程", "Option": "选项", "Before": "之前", "After": "之后", "Takes effect": "生效时间", "immediately": "立即", "after a restart": "重启后", "after reloading the model": "重新加载模型后",
};

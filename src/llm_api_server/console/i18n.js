// English is what the code says; here is the Chinese for it. A text that is missing here is shown in English.

const CHINESE = {
  "Models": "模型", "Playground": "试用", "Keys": "密钥", "Usage": "用量", "Requests": "请求", "Logs": "日志", "Settings": "设置",
  "Sign in": "登录", "Sign out": "退出", "Your key": "密钥", "Use a key with the permission admin, or any key to see your own usage and try models.": "使用具有 admin 权限的密钥；其他密钥只能查看自己的用量和试用模型。",
  "This key is not valid.": "密钥无效。", "Light": "浅色", "Dark": "深色", "Load": "加载", "Unload": "卸载", "Details": "详情", "Close": "关闭", "Cancel": "取消", "Yes": "确定",
  "No models yet": "还没有模型", "Download one below, or add it to the configuration.": "在下方下载，或写入配置文件。", "in flight": "处理中", "queued": "排队", "Memory": "内存", "free": "空闲", "other programs": "其他程序",
  "Add a model": "添加模型", "Source": "来源", "Download": "下载", "org/name of Hugging Face, ms:org/name, a URL of a .gguf file, or starter": "Hugging Face 的 org/name、ms:org/name、.gguf 文件的 URL，或 starter",
  "Name (optional)": "名称（可选）", "Revision (optional)": "版本（可选）", "Quantization or file (optional)": "量化或文件（可选）", "left": "剩余", "done": "完成", "failed": "失败", "cancelled": "已取消", "running": "进行中", "Forget": "移除",
  "Unload it? Requests under way finish first.": "确定卸载吗？正在处理的请求会先完成。", "stopped": "未加载", "starting": "加载中", "ready": "就绪", "sleeping": "休眠", "draining": "收尾中", "stopping": "停止中",
  "Model": "模型", "System prompt": "系统提示词", "Temperature": "温度", "Most tokens": "最大 token 数", "Message": "消息", "Send": "发送", "Stop": "停止", "New chat": "新对话", "Picture": "图片", "Ask something.": "输入问题开始对话。", "Enter sends, Shift+Enter begins a line.": "按 Enter 发送，Shift+Enter 换行。", "first token": "首个 token", "tokens/s": "token/秒",
  "as curl": "复制为 curl", "as Python": "复制为 Python", "Copied.": "已复制。", "Tools (JSON)": "工具（JSON）", "Parameters": "参数", "thinking": "思考", "Failed: ": "失败：",
  "New key": "新建密钥", "Name": "名称", "Permissions": "权限", "Models it may use": "可用模型", "Requests per minute": "每分钟请求数", "Tokens per minute": "每分钟 token 数", "Tokens per day": "每天 token 数", "At the same time": "并发数", "Ends": "到期", "such as 30d": "例如 30d", "Create": "创建",
  "This is the key. It is shown once: copy it now.": "这是密钥，只显示一次，请立即复制。", "Copy": "复制", "State": "状态", "Limits": "限制", "Last used": "最近使用", "Created": "创建时间", "Revoke": "吊销", "Rotate": "轮换", "Delete": "删除", "From": "来自", "store": "数据库", "config": "配置文件",
  "active": "有效", "disabled": "停用", "expired": "已过期", "revoked": "已吊销", "Revoke this key? Clients that use it are refused within a second.": "确定吊销该密钥吗？使用它的客户端会在一秒内被拒绝。", "Give it a new secret? The old one works for another day.": "确定更换密钥吗？旧密钥还可使用一天。", "Delete this key for good?": "确定永久删除该密钥吗？",
  "Last 24 hours": "最近 24 小时", "Last 7 days": "最近 7 天", "Last 30 days": "最近 30 天", "Tokens": "token", "Errors": "错误", "Mean time": "平均用时", "Tokens by hour": "每小时 token", "Tokens by day": "每天 token", "By model": "按模型", "By key": "按密钥", "Nothing was used in this time.": "这段时间没有用量。", "Key": "密钥",
  "Time": "时间", "Endpoint": "接口", "Status": "状态", "Wait": "等待", "First token": "首个 token", "Duration": "用时", "In": "输入", "Out": "输出", "No requests yet.": "还没有请求。", "Prompts are not kept.": "不保存提示词。", "runs": "进行中",
  "Log": "日志", "Lines": "行数", "Follow": "跟随", "Processes": "进程", "Configuration file": "配置文件", "Reload": "重新加载", "What would change?": "会改变什么？", "Nothing changes.": "没有变化。", "Applied.": "已应用。", "Effective options": "生效的选项", "Version": "版本", "Try again": "重试", "Loading …": "加载中 …", "needs a restart": "需要重启", "loads the model anew": "重新加载模型", "at once": "立即",
  "Explain": "能否加载", "phase": "阶段", "not said": "未知", "Manager": "管理进程", "Workers": "工作进程",
};

let language = localStorage.getItem("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
document.documentElement.lang = language;

export function t(text) {
  return language === "zh" ? CHINESE[text] ?? text : text;
}

export function otherLanguage() {
  return language === "zh" ? "English" : "中文";
}

export function switchLanguage() {
  language = language === "zh" ? "en" : "zh";
  localStorage.setItem("language", language);
  document.documentElement.lang = language;
}
